"""Adds generated pages to the site when it is built: the settings from conf/'s comments, the Python
reference, the notebook, and the figures and pages of the repository's root."""

from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mtp_lightning.command_line.conf_comments import Option, groups  # noqa: E402

# Modules that a user of the library, or somebody who extends it, imports from.
DOORS = (
    "mtp_lightning.notebook",
    "mtp_lightning.opening",
    "mtp_lightning.weights",
    "mtp_lightning.decoding",
    "mtp_lightning.model",
    "mtp_lightning.mtp.config",
    "mtp_lightning.mtp.base",
    "mtp_lightning.mtp.inputs",
    "mtp_lightning.mtp.kinds",
    "mtp_lightning.mtp.feed",
    "mtp_lightning.mtp.chunk",
    "mtp_lightning.objective.terms.base",
    "mtp_lightning.objective.balance.base",
    "mtp_lightning.callbacks.base",
    "mtp_lightning.metrics",
    "data_modules.tasks.base",
    "data_modules.windows",
    "sweeps.report.__main__",
)


_SEARCH = 'data-md-component="search" role="dialog" aria-label="Search"'


def on_config(config: Any) -> Any:
    """Add the pages that the navigation does not name to How to, and a link to the repository."""
    named = set(re.findall(r"[\w/]+\.md", json.dumps(config.nav)))
    rest = sorted(f.name for f in (ROOT / "docs").glob("*.md") if f.name not in named)
    next(part["How to"] for part in config.nav if "How to" in part).extend(rest)
    config.repo_url = repository()
    return config


def repository() -> str | None:
    """The web address that this checkout was cloned from; None of a clone of a folder."""
    asked = ["git", "remote", "get-url", "origin"]
    url = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    url = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", url).removesuffix(".git")
    url = re.sub(r"//[^/@]*@", "//", url)  # without a name or a password
    return url if url.startswith("https://") else None


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the files that lie outside docs/."""
    made = {
        "reference/settings.md": _settings(),
        "reference/python.md": _python(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    for file in (ROOT / "docs").rglob("*.ipynb"):
        page = file.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        made[page] = _notebook(json.loads(file.read_text(encoding="utf-8")))
        files.remove(files.src_uris[file.relative_to(ROOT / "docs").as_posix()])
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for figure in (ROOT / "results").glob("*.svg"):
        files.append(File.generated(config, f"results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links of the repository work on the site; a link without a page becomes plain text."""
    up = "../" * page.file.src_uri.count("/")
    readme = ROOT / ("README.zh-CN.md" if page.file.src_uri.startswith("zh/") else "README.md")
    markdown = markdown.replace("<!-- questions -->", questions(readme))

    def link(found: re.Match[str]) -> str:
        bang, text, target = found.groups()
        target = re.sub(r"^(?:\.\./)+", "", target)
        if page.file.src_uri in ("contributing.md", "changelog.md"):
            target = target.removeprefix("docs/")
        known = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
        target = known.get(target, target)
        if target.partition("#")[0] in files.src_uris:
            return f"{bang}[{text}]({up}{target})"
        return text

    outward = r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)\s]+|docs/[^)\s]+|CONTRIBUTING\.md|CHANGELOG\.md)\)"
    if page.file.src_uri.startswith("tutorial/"):  # ../methods.md is a page of the site
        return markdown.replace("(notebook.ipynb)", "(notebook.md)")
    return re.sub(outward, link, markdown)


def questions(readme: Path) -> str:
    """The three questions with their answers and tables, as a README has them."""
    block = re.split(r"<!-- /?claims.*?-->", readme.read_text(encoding="utf-8"))[1]
    kept = [part for part in block.strip().split("\n\n") if part.startswith(("**", "|"))]
    return "\n\n".join(kept).replace("](docs/", "](../")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Give the search dialog its accessible name, which the theme leaves out."""
    return output.replace('data-md-component="search" role="dialog"', _SEARCH)


def _settings() -> str:
    parts = [
        "# Every setting",
        "This page is made from the comments of `conf/`. In a terminal, "
        "`python train.py --help mtp` lists the options of a group and "
        "`--help mtp=sequential` explains the keys of one. A key is typed after its group, "
        "`mtp.depth=4`; keys of experiments and of the files at the root have their full name "
        "here. Keys of an included file are explained there (`base`, `task`).",
    ]
    for group, options in groups().items():
        parts.append(f"## {group or 'The whole experiment, and the other programs'}")
        parts += [_option(option) for option in options.values()]
    return "\n\n".join(parts)


def _option(option: Option) -> str:
    title = f"{option.group}={option.name}" if option.group else f"{option.name}.yaml"
    comment = re.sub(r"^ {2,}(\S.*)$", r"    \1", option.comment, flags=re.MULTILINE)
    comment = re.sub(r"^(?! {4})(.*)\n(?= {4})", r"\1\n\n", comment, flags=re.MULTILINE)
    rows = [
        f"| `{key.name}` | {_code(key.default) if key.default else ''} | {_cell(key.comment)} |"
        for key in option.keys
    ]
    table = ["| key | default | |\n|---|---|---|\n" + "\n".join(rows)] if rows else []
    return "\n\n".join([f"### `{title}`", _escaped(comment), *table])


def _escaped(text: str) -> str:
    """Escape Markdown in comments, which are plain text."""
    return "\n".join(
        line if line.startswith("    ") else re.sub(r"([*_<\[\]])", r"\\\1", line)
        for line in text.splitlines()
    )


def _cell(text: str) -> str:
    return re.sub(r"([*_<\[\]|`])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def _python() -> str:
    head = [
        "# Python",
        "These are the modules that a notebook, a script or an idea of yours imports. "
        "[Contributing](../contributing.md) lists all others, and "
        "[Your own idea](../extending.md) has recipes.",
    ]
    return "\n\n".join([*head, *(f"::: {module}" for module in DOORS)])


def _notebook(content: dict[str, Any]) -> str:
    """A notebook's cells and outputs as Markdown."""
    parts = []
    for cell in content["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        parts += filter(None, map(_output, cell["outputs"]))
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
    if "image/png" in data:
        png = base64.b64encode(base64.b64decode(data["image/png"])).decode()
        return f'<img alt="what this cell draws" src="data:image/png;base64,{png}">'
    if "text/html" in data:
        return f'<div class="output" markdown="0">{data["text/html"]}</div>'
    plain = data.get("text/plain") or "".join(output.get("text", ""))
    return f"```text\n{plain.rstrip()}\n```" if plain else ""
