"""What may be taken from a file that somebody stored: the one list, which all readers go through.

A run, a checkpoint, a sweep's plan, a claim, a tokenizer or a model may come from anybody. What
such a file says is data. Of its values

* a text is a text: an interpolation (``${oc.env:TOKEN}``) is refused, since a run stores values;
* a class is one of this platform's own (:func:`own_targets`), or of a package that is allowed by
  name, and one that reaches the network (:data:`NETWORK`) is allowed by name alone;
* a name is one path component (:func:`component`), and where files are written (:data:`WRITTEN`)
  is said on the command line, but for a cache folder that is one already;
* a size is one that somebody may mean (:data:`LARGEST`), and a model fits into memory
  (:func:`require_memory`) and into its own file (``run/loading.py``);
* in Markdown it is plain text (``markdown.py``).
"""

from __future__ import annotations

import json
import os
import pydoc
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF

# Own classes that read from the network or send to it, and the name that allows them.
NETWORK = {
    "data_modules.sources.HuggingFaceSource": "huggingface",
    "data_modules.tokenizers.PretrainedTokenizer": "huggingface",
    "mtp_lightning.loggers.mlflow.RunMLflow": "mlflow",
    "mtp_lightning.loggers.trackio.RunTrackio": "trackio",
    "mtp_lightning.loggers.wandb.RunWandb": "wandb",
}
# What data are built of, by the groups of conf/ that name it.
DATA = ("data", "tokenizer", "experiment")
# Last parts of keys that say where files are written.
WRITTEN = frozenset(
    {"cache_dir", "default_root_dir", "dir", "dirpath", "folder", "output", "output_dir", "run_dir",
     "save_dir", "sweep_dir"}
)  # fmt: skip
# The largest whole number of a stored setting of data, by its key: more would take all memory,
# all processes, or hours. Seeds are any number.
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
# Ids of a vocabulary: four times as many as the largest tokenizer in use has.
LARGEST_VOCAB = 1 << 20

_TARGET = re.compile(r"^\s*_target_:\s*([\w.]+)\s*$", re.MULTILINE)
# What a layer of no width takes as objects of Python.
BYTES_OF_LAYER = 10_000


def read_json(file: Path) -> Any:
    """What a stored file of JSON holds.

    Raises:
        UserError: it is no JSON, too deep, or has a number of thousands of digits.
        OSError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def values(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in plain containers that is none itself, with its dotted key."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from values(value, key)
    else:
        yield key, node


def require_text(node: Any, *, source: object) -> None:
    """Refuse interpolations in plain containers.

    Args:
        node: as it was stored.
        source: the file, for the message.

    Raises:
        UserError: a text with ``${``, or containers in containers without end.
    """
    try:
        for key, value in values(node):
            for text in (key, value):
                if isinstance(text, str) and "${" in text:
                    raise UserError(
                        f"{source} is refused: its {key} is the interpolation {text[:80]!r}, and "
                        "what was stored is not looked up anywhere."
                    )
    except RecursionError as error:
        raise UserError(f"{source} is refused: it holds lists in lists without end.") from error


def require_sizes(node: Any, *, source: object) -> None:
    """Refuse stored settings of data that nobody means.

    Args:
        node: the group ``data``, as it was stored.
        source: the file, for the message.

    Raises:
        UserError: a whole number above what its key may have.
    """
    for key, value in values(node):
        parts = key.split(".")
        if "seed" in parts[-1] or not isinstance(value, int):
            continue
        else_ = LARGEST_OF_TASK if "task" in parts else LARGEST_ELSE
        most = LARGEST.get(parts[-1], else_)
        if value > most:
            raise UserError(
                f"{source} is refused: its data.{key} is {brief(value)}, and what is stored may be "
                f"at most {most:,}."
            )


def brief(number: int) -> str:
    """A whole number as people read it, whatever its digits."""
    return f"{number:,}" if abs(number) < 10**24 else f"a number of {number.bit_length()} bits"


@cache
def own_targets(*groups: str) -> frozenset[str]:
    """What the files of conf/, or of some groups of it, build. (A package's name is no guard:
    ``mtp_lightning.run.atomic.os.replace`` begins with it, too.)"""
    folders = [CONF / group for group in groups] or [CONF]
    files = [file for folder in folders for file in folder.rglob("*.yaml")]
    return frozenset(target for file in files for target in targets_of(file))


def targets_of(file: Path) -> list[str]:
    """What a file of conf/ builds."""
    return _TARGET.findall(file.read_text(encoding="utf-8"))


def require_target(
    target: str, allow: Collection[str], *, groups: Sequence[str] = (), how: str
) -> None:
    """Refuse a class of somebody's.

    Args:
        target: as in ``_target_``.
        allow: packages whose own classes may be built.
        groups: of conf/, whose classes may be, too; none is all of them.
        how: what allows a package, with ``{}`` for its name.

    Raises:
        UserError: with the remedy.
    """
    if target not in own_targets(*groups) and not _defined_in(target, allow):
        raise UserError(
            f"_target_={target} is refused: what was stored may only build what this platform's "
            f"own conf/ builds. If you trust its package, say {how.format(target.split('.')[0])}."
        )


def _defined_in(target: str, allow: Collection[str]) -> bool:
    """Whether a target is a class of an allowed package, and not one that the package imported."""
    if target.partition(".")[0] not in allow:
        return False
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise UserError(not_importable(target, error)) from error
    if found is None:
        raise UserError(not_importable(target, "there is none"))
    module = getattr(found, "__module__", "")
    return isinstance(found, type) and module.partition(".")[0] in allow


def not_importable(target: str, reason: object) -> str:
    """The sentence about a class that is not there."""
    return (
        f"_target_={target} cannot be imported ({' '.join(str(reason).split())}): check the name, "
        "and that its folder is on PYTHONPATH."
    )


def targets(node: Any) -> list[str]:
    """Every ``_target_`` in plain containers."""
    return [str(value) for key, value in values(node) if key.rpartition(".")[2] == "_target_"]


def require_network(target: str, allow: Collection[str], *, how: str) -> None:
    """Refuse a class that reaches the network and was not allowed.

    Args:
        target: as in ``_target_``.
        allow: names that the user gave.
        how: what allows it, with ``{}`` for the name.

    Raises:
        UserError: with the remedy.
    """
    name = NETWORK.get(target)
    if name is not None and name not in allow:
        raise UserError(
            f"_target_={target} is refused: what was stored reaches no network unasked. If you "
            f"trust its author, say {how.format(name)}."
        )


def component(name: Any) -> bool:
    """Whether a stored name is one path component, and not hidden."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and not name.startswith((".", "~"))
        and not re.search(r"[/\\\x00-\x1f]", name)
    )


def is_cache(folder: Any) -> bool:
    """Whether token stores may be written to a folder that a file names: it is a cache already.

    Args:
        folder: as the file has it.
    """
    if not isinstance(folder, str | Path) or not str(folder):
        return False
    path = Path(folder).expanduser()
    try:
        stores = (path / "digests").is_dir() or next(path.glob("*/meta.json"), None) is not None
        return stores
    except OSError:
        return False


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(config: Any, *, bytes_each: int, machines: int = 1) -> None:
    """Refuse a model that this machine cannot hold, before anything of it is there.

    Args:
        config: a ``ModelConfig``.
        bytes_each: of a weight.
        machines: of this size that share it.

    Raises:
        UserError: with its size and the machine's memory.
    """
    trunk, depth = config.trunk, config.mtp.depth
    names = ("n_layers", "d_model", "d_ff", "vocab_size")
    sizes = {f"model.{key}": getattr(trunk, key) for key in names} | {"mtp.depth": depth}
    what = ("a model of", sizes, "its weights alone")
    # The weights are counted of layers that could be there alone.
    require_fits((trunk.n_layers + depth) * BYTES_OF_LAYER, *what, machines=machines)
    require_fits(config.num_params() * bytes_each, *what, machines=machines)


def require_fits(
    needed: int, what: str, sizes: Mapping[str, int], holds: str, *, machines: int = 1
) -> None:
    """Refuse what takes more memory than there is.

    Args:
        needed: bytes, at least.
        what: takes them, such as ``a model of``.
        sizes: of it, by the key that sets each.
        holds: what of it takes them.
        machines: of this size that share it.

    Raises:
        UserError: with the sizes and the machine's memory.
    """
    if needed > (memory := memory_bytes() * machines):
        told = ", ".join(f"{key}={brief(size)}" for key, size in sizes.items())
        raise UserError(
            f"{what} {told} takes {_gigabytes(needed)} for {holds}, and there are "
            f"{_gigabytes(memory)} of memory: make it smaller."
        )


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n < 10**18 else "more than 10^9 GB"
