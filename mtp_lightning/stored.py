"""The rules for values from stored files. All readers of stored files use them.

A run, a checkpoint, a sweep's plan, a claim, a tokenizer or a model may come from anybody, so its
values are treated as data, and the functions below refuse others by a :class:`UserError`:

* a text with an interpolation (``${oc.env:TOKEN}``) is refused, since runs store resolved values;
* a class must be one that conf/ builds (:func:`own_targets`) or belong to a package that the user
  allows by name; a class that uses the network (:data:`NETWORK`) must always be allowed by name;
* a name must be one path component (:func:`component`), and folders that are written to
  (:data:`WRITTEN`) come from the command line, except for an existing cache folder;
* a size must be plausible (:data:`LARGEST`), and a model must fit into memory
  (:func:`require_memory`) and match the size of its own file (``run/loading.py``);
* a text in Markdown is escaped (``markdown.py``).
"""

from __future__ import annotations

import json
import math
import os
import pydoc
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF

# This project's classes that use the network, and the name that allows each.
NETWORK = {
    "data_modules.sources.HuggingFaceSource": "huggingface",
    "data_modules.tokenizers.PretrainedTokenizer": "huggingface",
    "mtp_lightning.loggers.mlflow.RunMLflow": "mlflow",
    "mtp_lightning.loggers.trackio.RunTrackio": "trackio",
    "mtp_lightning.loggers.wandb.RunWandb": "wandb",
}
# The groups of conf/ whose classes build data.
DATA = ("data", "tokenizer", "experiment")
# Last parts of the keys of paths that are written to.
WRITTEN = frozenset(
    {"cache_dir", "default_root_dir", "dir", "dirpath", "folder", "output", "output_dir", "run_dir",
     "save_dir", "sweep_dir"}
)  # fmt: skip
# The largest whole number of a stored data setting, by its key. More would take all memory, too
# many processes, or hours. Seeds are not limited.
LARGEST = {
    "batch_size": 1 << 16,
    "build_workers": 64,
    "decode_batch_size": 1 << 12,
    "depth": 1 << 12,
    "eval_batch_size": 1 << 16,
    "eval_examples": 1 << 17,
    "n_prompts": 1 << 22,
    "num_workers": 64,
    "seq_len": 1 << 22,
    "stride": 1 << 12,
}
LARGEST_OF_TASK = 1 << 14
LARGEST_ELSE = 10**10
# The largest vocabulary: four times the largest tokenizer in use.
LARGEST_VOCAB = 1 << 20

_TARGET = re.compile(r"^\s*_target_:\s*([\w.]+)\s*$", re.MULTILINE)
# Bytes of a layer's Python objects, without its weights.
BYTES_OF_LAYER = 10_000


def read_json(file: Path) -> Any:
    """Read a stored JSON file.

    Raises:
        UserError: the file is not JSON, is nested too deeply, or has a number of thousands of
            digits.
        OSError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def values(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in nested plain containers, with its dotted key."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from values(value, key)
    else:
        yield key, node


def require_text(node: Any, *, source: object) -> None:
    """Refuse a text with ``${`` in plain containers, and containers that are nested too deeply."""
    try:
        for key, value in values(node):
            for text in (key, value):
                if isinstance(text, str) and "${" in text:
                    raise UserError(
                        f"{source} is refused: its {key} is the interpolation {text[:80]!r}, and "
                        "interpolations of stored files are not resolved."
                    )
    except RecursionError as error:
        raise UserError(f"{source} is refused: its lists are nested too deeply.") from error


def require_sizes(node: Any, *, source: object = None) -> None:
    """Refuse data settings of implausible size.

    Args:
        source: the file that stores them; None for those of a command line, so that no run begins
            that could not be evaluated.
    """
    for key, value in values(node):
        parts = key.split(".")
        if "seed" in parts[-1] or not isinstance(value, int):
            continue
        most = LARGEST.get(parts[-1], LARGEST_OF_TASK if "task" in parts else LARGEST_ELSE)
        if value <= most:
            continue
        if source is None:
            raise UserError(f"data.{key}={brief(value)} is too large: give at most {most:,}.")
        raise UserError(
            f"{source} is refused: its data.{key} is {brief(value)}, and a stored value may be "
            f"at most {most:,}."
        )


def brief(number: int) -> str:
    """Format a whole number for people, also one of thousands of digits."""
    return f"{number:,}" if abs(number) < 10**24 else f"a number of {number.bit_length()} bits"


@cache
def own_targets(*groups: str) -> frozenset[str]:
    """The classes that conf/, or some of its groups, build. The package's name alone would not be
    safe to check: ``mtp_lightning.run.atomic.os.replace`` begins with it too."""
    folders = [CONF / group for group in groups] or [CONF]
    files = [file for folder in folders for file in folder.rglob("*.yaml")]
    return frozenset(target for file in files for target in targets_of(file))


def targets_of(file: Path) -> list[str]:
    """The classes that a file of conf/ builds."""
    return _TARGET.findall(file.read_text(encoding="utf-8"))


def require_target(
    target: str, allow: Collection[str], *, groups: Sequence[str] = (), how: str
) -> None:
    """Refuse a foreign class of a stored config, and one that uses the network.

    Args:
        target: the value of ``_target_``.
        allow: packages whose own classes may be built, and names of :data:`NETWORK`.
        groups: groups of conf/ whose classes may be built; empty for all groups.
        how: the setting that allows a name, with ``{}`` for it.
    """
    if target not in own_targets(*groups) and not _defined_in(target, allow):
        raise UserError(
            f"_target_={target} is refused: a stored config may only build what this platform's "
            f"own conf/ builds. If you trust its package, say {how.format(target.split('.')[0])}."
        )
    require_network(target, allow, how=how)


def _defined_in(target: str, allow: Collection[str]) -> bool:
    """Whether a target is a class that an allowed package defines itself, not one it imports."""
    if target.partition(".")[0] not in allow:
        return False
    try:
        located = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise UserError(not_importable(target, error)) from error
    if located is None:
        raise UserError(not_importable(target, "there is none"))
    module = getattr(located, "__module__", "")
    return isinstance(located, type) and module.partition(".")[0] in allow


def not_importable(target: str, reason: object) -> str:
    """The sentence about a class that cannot be imported."""
    return (
        f"_target_={target} cannot be imported ({' '.join(str(reason).split())}): check the name, "
        "and that its folder is on PYTHONPATH."
    )


def targets(node: Any) -> list[str]:
    """Every ``_target_`` in plain containers."""
    return [str(value) for key, value in values(node) if key.rpartition(".")[2] == "_target_"]


def require_network(target: str, allow: Collection[str], *, how: str) -> None:
    """Refuse a class that uses the network, unless ``allow`` has its name in :data:`NETWORK`;
    arguments as for :func:`require_target`."""
    name = NETWORK.get(target)
    if name is not None and name not in allow:
        raise UserError(
            f"_target_={target} is refused: a stored config may not use the network unasked. If "
            f"you trust its author, say {how.format(name)}."
        )


def component(name: Any) -> bool:
    """Whether a stored name is a single path component that is not hidden."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and not name.startswith((".", "~"))
        and not re.search(r"[/\\\x00-\x1f]", name)
    )


def is_cache(folder: Any) -> bool:
    """Whether a folder that a stored file names is already a cache, so that token stores may be
    written to it."""
    if not isinstance(folder, str | Path) or not str(folder):
        return False
    path = Path(os.path.expanduser(folder))
    try:
        return (path / "digests").is_dir() or any(path.glob("*/meta.json"))
    except OSError:
        return False


def require_memory(config: Any, *, machines: int = 1) -> None:
    """Refuse the model of a ``ModelConfig`` that is too large for the memory of the machines (of
    this one's size) that share it, before it is built; a weight takes 2 bytes at least."""
    trunk, keys = config.trunk, ("n_layers", "d_model", "d_ff", "vocab_size")
    modules = {f"mtp.{key}": getattr(config.mtp, key) for key in ("depth", "blocks", "rank")}
    sizes = {f"model.{key}": getattr(trunk, key) for key in keys} | modules
    what = ("a model of", sizes, "its weights alone")
    # Checked first, since counting the weights takes time for every layer.
    n_layers = trunk.n_layers + math.prod(modules.values())
    require_fits(n_layers * BYTES_OF_LAYER, *what, machines=machines)
    require_fits(2 * config.num_params(), *what, machines=machines)


def require_fits(
    needed: int, what: str, sizes: Mapping[str, int], holds: str, *, machines: int = 1
) -> None:
    """Refuse something that needs more memory than the machines have.

    Args:
        needed: a lower bound of the bytes needed.
        what: the thing, such as ``a model of``.
        sizes: its sizes, by the key that sets each.
        holds: the part of the thing that needs these bytes.
        machines: the number of machines, of this one's size, that share it.
    """
    if needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * machines):
        settings = ", ".join(f"{key}={brief(size)}" for key, size in sizes.items())
        raise UserError(
            f"{what} {settings} takes {_gigabytes(needed)} for {holds}, and there are "
            f"{_gigabytes(memory)} of memory: make it smaller."
        )


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n < 10**18 else "more than 10^9 GB"


def kept_json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """The content of one of the files that are kept with a tokenizer, a JSON object; empty without
    the file. A damaged one is refused."""
    try:
        content = json.loads(files.get(name, "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the tokenizer's {name} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"the tokenizer's {name} is damaged: it holds no object.")
    return content


def special_token(files: Mapping[str, str], role: str) -> str | None:
    """The special token of a role, such as ``eos_token``, that these files name. As in
    transformers, the special_tokens_map.json of an older folder comes first."""
    config = kept_json(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= kept_json(files, "special_tokens_map.json")
    token = config.get(role)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
