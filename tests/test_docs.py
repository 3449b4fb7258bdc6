"""The tables of docs/architecture.md equal the code's layers and names, and those of
docs/should_i.md the claims' numbers."""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Iterator

import pytest

from sweeps.claims import words
from tests.layout import ROOT, imports, sources, takes


def table(page: str, name: str) -> list[list[str]]:
    """The cells of the table after ``<!-- table: NAME -->``, without its head."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- table: {name} -->\n((?:\|.*\n)+)", text)
    assert found, f"{page} has no table {name!r}"
    lines = found[1].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


LAYERS = {
    module: line
    for line, row in enumerate(table("architecture.md", "layers"))
    for module in row[1].split(", ")
}
# "| what happens | `function`, `function` in `file` |": the last of a row's names is the file.
WALKS = [
    (file, name)
    for walk in ("batch", "config", "prompt")
    for row in table("architecture.md", walk)
    for *names, file in [re.findall(r"`([\w./]+)`", row[1])]
    for name in names
]


@pytest.mark.parametrize("module", LAYERS)
def test_imports_run_down_the_layers(module: str) -> None:
    homes = f"mtp_lightning/{module}.py", f"mtp_lightning/{module}/"
    files = [file for file in sources("mtp_lightning") if file.startswith(homes)]
    assert files, f"there is no mtp_lightning.{module}"
    for file in files:
        names = [name.split(".")[1] for name in imports(file) if takes(name, "mtp_lightning")]
        for other in set(names) - {module}:
            drawn = LAYERS.get(other)  # None for what is not in the picture
            assert drawn is None or drawn > LAYERS[module], f"{file} imports {other}"


def test_the_picture_is_drawn_from_the_table() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "picture.py"))
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    assert picture == drawing["drawn"](drawing["layers"]()), "python docs/picture.py"
    assert len(LAYERS) > 15


def definitions(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """Functions, classes and their methods, as dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name
            yield from definitions(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize(("file", "name"), WALKS)
def test_the_functions_of_the_walks_exist(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in set(definitions(tree))


MEASURED = table("should_i.md", "measured")


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: " ".join(row[:3]))
def test_the_measured_numbers_equal_those_of_the_claims(row: list[str]) -> None:
    name, subject, quantity, measured, verdict = row
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    found = [
        (words.measured(entry), entry["verdict"])
        for entry in words.entries(result)
        if (words.subject(entry), words.quantity(entry["measure"])) == (subject, quantity)
    ]
    assert found == [(measured, verdict)]


def test_the_named_claims_exist() -> None:
    text = (ROOT / "docs" / "should_i.md").read_text(encoding="utf-8")
    claims = {path.stem for path in (ROOT / "sweeps" / "claims").glob("*.yaml")}
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", text))
    assert len(MEASURED) > 10 and {row[0] for row in MEASURED} <= claims
    assert named - claims == set(), "no claims"
