"""What a person types is taken literally: texts and paths are quoted before Hydra parses them.

Hydra's grammar has a meaning for brackets, commas, quotes, equal signs and ``${``, and none for
most of Unicode. A prompt or a path is what it is, so that every app quotes these values first:

    prompt=def main(            ->  prompt='def main('
    run_dir=运行                ->  run_dir='运行'

Three kinds of values go on meaning what they mean to Hydra: one in quotes, ``prompt='"a b"'`` (so
that a quoted value can be handed on as it is); a list for a key that takes one,
``'data.paths=[a,b]'``; and, in a path, ``null`` and ``${now:%H-%M}``. With ``-m``, commas part the
paths that are read, unless a path of the whole name is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from mtp_lightning.errors import UserError

# Texts: nothing in them is for Hydra, neither null nor ${...}.
TEXTS = frozenset({"prompt", "stop"})
# Paths of what is written, which are never values of a sweep.
PLACES = frozenset(
    {
        "callbacks.checkpoints.folder",
        "data.cache_dir",
        "data.source.cache_dir",
        "output",
        "paths.cache_dir",
        "paths.output_dir",
        "run_dir",
        "sweep_dir",
    }
)
# Paths of what is read, and names in it.
INPUTS = frozenset(
    {
        "branch_from",
        "checkpoint",
        "compare.reference",
        "data.field",
        "data.model",
        "data.paths",
        "data.prompts.paths",
        "data.source.data_files",
        "data.source.field",
        "data.source.path",
        "init_from",
        "prompts",
        "tokenizer.eot_token",
        "tokenizer.path",
    }
)
# Those of all these that may be a list, and a mapping.
LISTS = frozenset({"stop", "data.paths", "data.prompts.paths", "data.source.data_files"})
MAPPINGS = frozenset({"data.source.data_files"})

# What Hydra reads as this very text, unquoted; the commonest paths stay as they are typed.
_PLAIN = re.compile(r"(?!(?:true|false|null|inf|nan)\Z)[a-z_/][\w/.-]*", re.ASCII | re.IGNORECASE)
# One of several values: in quotes, or up to the next comma.
_PART = re.compile(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]*?)\s*(,|\Z)""", re.DOTALL)
_OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)


def literal(arguments: Sequence[str]) -> list[str]:
    """The command line that means to Hydra what these arguments say to a person.

    Args:
        arguments: without the program. Given back in, the result does not change.
    """
    multirun = any(arg in ("-m", "--multirun", "hydra.mode=MULTIRUN") for arg in arguments)
    return [_literal(argument, multirun=multirun) for argument in arguments]


def require_utf8(arguments: Sequence[str]) -> None:
    """Refuse a text whose bytes are no text. (The name of a file may have any.)

    Raises:
        UserError: naming the key and the byte.
    """
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        bad = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None)
        if key in TEXTS and bad is not None:
            byte = f"0x{ord(bad) & 0xFF:02x}"
            raise UserError(f"{key} is not UTF-8 (byte {byte} at {value.index(bad)}): convert it.")


def quoted(text: str) -> str:
    """A text in quotes, such that Hydra's and OmegaConf's grammars read it back as it is."""
    return _in_quotes(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def _literal(argument: str, *, multirun: bool) -> str:
    match = _OVERRIDE.fullmatch(argument)
    if match is None:
        return argument
    plus, key, value = match.groups()
    if _PLAIN.fullmatch(value):
        return argument
    if key in TEXTS:
        return f"{plus}{key}={_value(key, value, quoted)}"
    if key not in PLACES | INPUTS or value.lower() == "null":
        return argument
    if multirun and key in INPUTS and "," in value and not os.path.exists(value):
        kind = _kind(value)
        if kind == "none" and value[:1] != "[":
            return f"{plus}{key}={_each(value, _in_quotes)}"
        if kind == "sweep":
            return argument
    return f"{plus}{key}={_value(key, value, _in_quotes)}"


def _value(key: str, value: str, quote: Callable[[str], str]) -> str:
    listed = key in LISTS and value[:1] + value[-1:] == "[]" and not os.path.exists(value)
    if listed or value[:1] in ("'", '"', "{"):
        kind = _kind(value)
        if kind == "quoted" or kind == "list" and listed or kind == "mapping" and key in MAPPINGS:
            return value
    return f"[{_each(value[1:-1], quote)}]" if listed else quote(value)


def _each(values: str, quote: Callable[[str], str]) -> str:
    """Values that commas part, each as it is typed or in quotes of its own already."""
    parts, end, more = [], 0, True
    while more:
        match = _PART.match(values, end)
        assert match is not None, "it matches everything up to the end"
        parts.append(match[1] if _kind(match[1]) == "quoted" else quote(match[1]))
        end, more = match.end(), match[2] == ","
    return ",".join(parts)


def _in_quotes(text: str) -> str:
    # A quote is escaped, and so are the backslashes before one: those of the text before its own
    # quotes, and those at its end.
    return "'" + re.sub(r"(\\*)('|\Z)", _escaped, text) + "'"


def _escaped(match: re.Match[str]) -> str:
    return match[1] * 2 + ("\\'" if match[2] else "")


def _kind(value: str) -> str:
    """What Hydra's grammar reads: quoted, list, mapping, sweep or plain; none outside of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString, Sweep
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")._value
    except HydraException:
        return "none"
    kinds = {"quoted": QuotedString, "list": list, "mapping": dict, "sweep": Sweep}
    return next((name for name, kind in kinds.items() if isinstance(parsed, kind)), "plain")
