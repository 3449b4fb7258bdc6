"""Checks a config before torch is imported: every mistake that can be seen from the config alone.

``keys.py`` has the rules for each key. The keys of a user's own classes are not checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from glob import has_magic
from pathlib import Path
from typing import Any

from mtp_lightning import parts
from mtp_lightning.command_line import keys
from mtp_lightning.command_line.conf_comments import PARTS, groups, groups_of, value_at
from mtp_lightning.command_line.quote import INPUTS, LISTS
from mtp_lightning.errors import UserError, require_package
from mtp_lightning.paths import CONF
from mtp_lightning.settings import is_whole
from mtp_lightning.stored import BYTES_OF_LAYER, require_fits, require_sizes, values

# Nodes without a class that take no other keys than the known ones.
_CLOSED = ("", "compare", "decode", "paths", "stack", "sweep", "trainer")
# Inputs that may be names on a hub, or whose own class reports mistakes better.
_NOT_ONLY_PATHS = {
    *("data.field", "data.path", "data.source.field", "data.source.path", "data.val_path"),
    "tokenizer.eot_token",
}


def check(
    config: Mapping[str, Any], app: str, typed: Collection[str] = (), folder: str | None = None
) -> None:
    """Refuse a composed config that has a mistake.

    Args:
        config: the config as plain containers. Interpolations may be unresolved.
        app: the app's root config in conf/, such as ``generate``.
        typed: the overrides of the command line.
        folder: the run's folder; None skips the checks of paths.

    Raises:
        UserError: a key is unknown, a value is not allowed, values do not fit together, a package
            or a part is missing, or a path is wrong.
    """
    for override in typed:
        group, _, option = override.lstrip("+~").partition("=")
        is_needed = group.rpartition(".")[0] in _CLOSED or group.endswith("._target_")
        if is_needed and override.startswith("~") and group not in groups():
            raise UserError(f"{override} deletes a key that every run needs: leave that out.")
        if option in PARTS and group in groups():
            from mtp_lightning.command_line.hydra_errors import unknown_option

            raise UserError(unknown_option(group, option, groups()[group]))
        if override.startswith("+"):
            _require_read(override, config, app)
        if group == "data.tokenizer":
            raise UserError(
                f"{override} does not set the tokenizer: train.py has tokenizer=..., and a trained "
                "model has its own."
            )
    # init_from may bring another kind of trunk than ``model`` describes, with other keys.
    imported = config.get("init_from") is not None
    for path, node in keys.nodes(config, ""):
        _check_node(node, path, app, open=imported and path.split(".")[0] == "model")
    _check_together(config)
    require_sizes(config.get("data"))
    if folder is not None:
        _check_paths(config, app, folder)


def require_new_names(folder: Path) -> None:
    """Refuse a folder of further configs with a file of conf/, since Hydra would ignore it."""
    if folder.resolve() == CONF.resolve():
        return
    for file in sorted(CONF.rglob("*.yaml")):
        own = folder / file.relative_to(CONF)
        if own.is_file():
            raise UserError(f"{own} has the name of an option of this project: rename it.")


def check_values(node: Mapping[str, Any], path: str) -> None:
    """Refuse values of a node, and of all nodes in it, that the rules of their class exclude."""
    for inner, child in keys.nodes(node, path):
        target = str(child.get("_target_", ""))
        for key, comment in keys.of_class(target).keys.items():
            if key in child:
                name = keys.join(inner, key)
                keys.require_allowed(name, child[key], comment, _option(inner, target))


def check_settings(built: Any, path: str) -> None:
    """Check an object's attributes as :func:`check_values` checks a node at ``path``. An object of
    a class that ``conf/`` does not build is checked as one of its nearest base class."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(built).__mro__]
    nearest = next((name for name in names if keys.of_class(name).keys), "")
    check_values({**vars(built), "_target_": nearest}, path)


def _option(path: str, target: str) -> str:
    """``mtp=top`` for a class in the module ``top``."""
    return f"{path}={target.split('.')[-2]}" if "." in target else "this option"


def _check_node(node: Mapping[str, Any], path: str, app: str, *, open: bool) -> None:
    target = str(node.get("_target_", ""))
    if (missing_part := parts.absent(target)) is not None:
        raise UserError(parts.missing(missing_part, f"{path}._target_={target}"))
    rules = keys.of_class(target) if target else keys.of_node(path, app)
    closed = not (open or rules.open) and (bool(target) or path == "trainer")
    for key, value in node.items():
        name = keys.join(path, key)
        if closed and key not in rules.keys and not str(key).startswith("_"):
            raise _unknown(name, rules.keys, app)
        comment = rules.keys.get(key, "mapping, or null" if path in keys.SEVERAL else None)
        if comment is not None:
            if value == "???":
                raise UserError(f"{name} has no value: give it as {name}=...")
            keys.require_allowed(name, value, comment, _option(path, target))
    if rules.needs is not None:
        what, package, extra = rules.needs
        require_package(package, what=what, extra=extra)


def _require_read(override: str, config: Mapping[str, Any], app: str) -> None:
    """Refuse a key that was added with ``+`` to a node of known keys, unless an interpolation uses
    it."""
    name = override.lstrip("+").partition("=")[0]
    if (group := name.partition(".")[0]) in groups() and group not in groups_of(app):
        raise _unknown(group, (), app)
    parent, _, key = name.rpartition(".")
    if "/" in name or "@" in name or name in groups() or parent not in _CLOSED:
        return
    names = {*keys.of_node(parent, app).keys, *(groups_of(app) if not parent else ())}
    used = re.compile(rf"\$\{{[^}}]*{re.escape(name)}\b")  # by an interpolation
    texts = (text for _, text in values(config) if isinstance(text, str))
    if key not in names and not any(map(used.search, texts)):
        raise _unknown(name, {name for name in names if "/" not in name}, app)


def _unknown(name: str, known: Collection[str], app: str) -> UserError:
    from mtp_lightning.command_line.hydra_errors import unknown_key

    return UserError(unknown_key(name, known, app))


def _check_together(config: Mapping[str, Any]) -> None:
    """Refuse values that do not fit together, or a model too large for this machine's memory."""
    require_reach(config)
    if isinstance(trainer := config.get("trainer"), Mapping) and "strategy" in trainer:
        from mtp_lightning import processes

        processes.check(trainer)
    match, reference = value_at(config, "compare.match"), value_at(config, "compare.reference")
    if match == "none" and reference is not None:
        raise UserError(
            f"compare.reference={reference} is used by nothing: set compare.match to parameters "
            "or flops, or compare.reference=null."
        )
    rows = "model.vocab_size" if _size(config, "model.vocab_size") else "tokenizer.vocab_size"
    names = ["model.n_layers", "model.d_model", "mtp.depth"]
    names += [rows] if value_at(config, "data.task") is None else []
    model = {key: size for key in names if (size := _size(config, key))}
    width = model.get("model.d_model", 0)
    # A lower bound: the embedding in 16 bits, or the Python objects of the layers.
    needed = max(
        2 * model.get(rows, 1) * width,
        BYTES_OF_LAYER * (model.get("model.n_layers", 0) + model.get("mtp.depth", 0)),
    )
    machines = max(1, _size(config, "trainer.num_nodes"))
    require_fits(needed, "a model of", model, "its weights alone", machines=machines)
    length = _size(config, "data.seq_len")
    window = {"data.seq_len": length} | ({"model.d_model": width} if width else {})
    # A lower bound: the ids, or one hidden state per token.
    needed = length * max(8, 4 * width)
    require_fits(needed, "a window of", window, "the states of its tokens alone")


def require_reach(config: Mapping[str, Any]) -> None:
    """Refuse a depth that looks further ahead than a window is long."""
    depth, length = value_at(config, "mtp.depth"), value_at(config, "data.seq_len")
    stride = value_at(config, "mtp.stride")
    stride = 1 if stride is None else stride
    if is_whole(depth) and is_whole(stride) and is_whole(length) and depth * stride > length:
        reach = f"mtp.depth={depth}" + ("" if stride == 1 else f" x mtp.stride={stride}")
        raise UserError(
            f"{reach} is larger than the window, data.seq_len={length}: predict fewer tokens, or "
            "lengthen the window."
        )


def _size(config: Mapping[str, Any], key: str) -> int:
    """The whole number at a dotted key of a config; 0 if there is none."""
    return value if is_whole(value := value_at(config, key)) else 0


def _check_paths(config: Mapping[str, Any], app: str, folder: str) -> None:
    """Refuse input paths that do not exist, and output paths that cannot be written."""
    for key in sorted(INPUTS - _NOT_ONLY_PATHS):
        value = value_at(config, key)
        for path in value if isinstance(value, list) and key in LISTS else [value]:
            if isinstance(path, str) and path != "???" and "${" not in path:
                _require_exists(key, path)
    output = value_at(config, "output")
    if app == "config":
        _require_folder("run_dir", Path(folder))
    elif app == "evaluate" and output is not None:
        if Path(output).is_dir():
            raise UserError(f"output={output} is a folder: give a file for the metrics.")
        # A device would be replaced by a file.
        if Path(output).exists() and not Path(output).is_file():
            raise UserError(f"output={output} is not a regular file: give one for the metrics.")
        _require_folder("output", Path(output).parent)
    elif app == "export" and output not in (None, "???"):
        folder_of = Path(output).parent if output.lower().endswith(".gguf") else Path(output)
        _require_folder("output", folder_of)
        if Path(output).is_dir() and any(Path(output).iterdir()):
            raise UserError(f"output={output} is not empty: choose another folder or clear it.")


def _require_exists(key: str, text: str) -> None:
    path = Path(os.path.expanduser(text))  # unlike Path.expanduser, leaves an unknown ~name
    if "@" in path.name and not path.exists():  # RUN@STEP
        path = Path(str(path).rpartition("@")[0])
    if path.exists():
        if key == "prompts" and not path.is_fifo():  # a pipe can be read once
            require_prompts(path)
        if key == "compare.reference" and not path.is_dir():
            raise UserError(f"{key}={text} is a file: give the folder of a finished run.")
        return
    is_path = key != "tokenizer.path" or path.suffix == ".json" or text[:1] in "./~"
    if is_path and not has_magic(text):
        raise UserError(f"{key}={text} does not exist (looked from {Path.cwd()}): check the path.")


def require_prompts(path: Path) -> str:
    """Read a file of prompts. A folder, or a file that is not UTF-8, raises a UserError; an
    unreadable file raises an OSError."""
    if path.is_dir():
        raise UserError(f"prompts={path} is a folder: give a file with one prompt per line.")
    try:
        return path.read_text(encoding="utf-8-sig")  # without the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise UserError(f"prompts={path} is not UTF-8: {error}; convert it.") from error


def _require_folder(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be created or written to."""
    parent = next((p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)), folder)
    if not parent.is_dir():
        kind = "a file" if parent.is_file() else "not a folder"
        raise UserError(f"{key}={folder} cannot be a folder, for {parent} is {kind}: take another.")
    if not os.access(parent, os.W_OK | os.X_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise UserError(f"{key}={folder} cannot be made: {parent} is read-only; take another.")
