"""Quotes texts and paths of the command line, so that Hydra takes them literally.

Hydra's grammar gives a meaning to brackets, commas, quotes, equal signs and ``${``, and refuses
most of Unicode. Every app therefore quotes prompts and paths first:

    prompt=def main(            ->  prompt='def main('
    run_dir=运行                ->  run_dir='运行'

Three kinds of values keep their meaning in Hydra: a quoted value, ``prompt='"a b"'`` (so that
quoting twice changes nothing); a list for a key that takes one, ``'data.paths=[a,b]'``; and, in a
path, ``null`` and ``${now:%H-%M}``. With ``-m``, commas separate the paths of inputs, unless a file
with the whole name exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from mtp_lightning.errors import UserError

# Keys of texts, in which null and ${...} are literal too.
TEXTS = frozenset({"prompt", "stop"})
# Keys of paths that are written to. A sweep never varies them.
PLACES = frozenset(
    {
        *("data.cache_dir", "data.source.cache_dir", "paths.cache_dir", "paths.output_dir"),
        *("output", "run_dir", "sweep_dir"),
    }
)
# Keys of paths that are read, and of names within them.
INPUTS = frozenset(
    {
        *("branch_from", "checkpoint", "compare.reference", "init_from", "prompts"),
        *("data.field", "data.model", "data.path", "data.paths", "data.prompts.paths"),
        *("data.val_path", "data.val_paths"),
        *("data.source.data_files", "data.source.field", "data.source.path"),
        *("tokenizer.eot_token", "tokenizer.path"),
    }
)
# The keys among these whose value may be a list, or a mapping.
LISTS = frozenset(
    {
        *("stop", "data.path", "data.paths", "data.prompts.paths", "data.source.data_files"),
        *("data.val_path", "data.val_paths"),
    }
)
MAPPINGS = frozenset({"data.source.data_files"})

# Values that Hydra reads literally without quotes, such as most paths.
_PLAIN = re.compile(r"(?!(?:true|false|null|inf|nan)\Z)[a-z_/][\w/.-]*", re.ASCII | re.IGNORECASE)
# One value of a comma-separated list: in quotes, or up to the next comma.
_PART = re.compile(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]*?)\s*(,|\Z)""", re.DOTALL)
_OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)


def literal(arguments: Sequence[str]) -> list[str]:
    """Quote texts and paths for Hydra; refuse an empty path. Quoting the result changes nothing."""
    multirun = any(arg in ("-m", "--multirun", "hydra.mode=MULTIRUN") for arg in arguments)
    return [_literal(argument, multirun=multirun) for argument in arguments]


def require_utf8(arguments: Sequence[str]) -> None:
    """Refuse a text that is not UTF-8, naming the key and the byte. Paths may have any bytes."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        bad = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None)
        if key in TEXTS and bad is not None:
            byte = f"0x{ord(bad) & 0xFF:02x}"
            raise UserError(f"{key} is not UTF-8 (byte {byte} at {value.index(bad)}): convert it.")


def quoted(text: str) -> str:
    """Quote a text so that Hydra and OmegaConf read it back unchanged."""
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
    if value in ("", '""', "''"):  # often an unset variable of the shell
        raise UserError(f"{key} has no value: give it as {key}=...")
    if value.startswith("~") and not os.path.lexists(value):  # most shells do not expand it here
        value = os.path.expanduser(value)
    if multirun and key in INPUTS and "," in value and not os.path.exists(value):
        kind = _kind(value)
        if kind == "none" and value[:1] != "[":
            return f"{plus}{key}={_each(value, _in_quotes)}"
        if kind == "sweep":
            return argument
    return f"{plus}{key}={_value(key, value, _in_quotes)}"


def _value(key: str, value: str, quote: Callable[[str], str]) -> str:
    is_list = key in LISTS and value[:1] + value[-1:] == "[]" and not os.path.exists(value)
    if is_list or value[:1] in ("'", '"', "{"):
        kind = _kind(value)
        if kind == "quoted" or kind == "list" and is_list or kind == "mapping" and key in MAPPINGS:
            return value
    return f"[{_each(value[1:-1], quote)}]" if is_list else quote(value)


def _each(values: str, quote: Callable[[str], str]) -> str:
    """Quote each of several values that commas separate, unless it is in quotes already."""
    parts, end, more = [], 0, True
    while more:
        match = _PART.match(values, end)
        assert match is not None, "it matches everything up to the end"
        parts.append(match[1] if _kind(match[1]) == "quoted" else quote(match[1]))
        end, more = match.end(), match[2] == ","
    return ",".join(parts)


def _in_quotes(text: str) -> str:
    # Escape the text's quotes, and the backslashes before a quote or at the end.
    doubled = re.sub(r"\\+(?='|\Z)", r"\g<0>\g<0>", text)
    return "'" + doubled.replace("'", "\\'") + "'"


def _kind(value: str) -> str:
    """The kind of value in Hydra's grammar: quoted, list, mapping, sweep or plain; none if it
    cannot be parsed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString, Sweep
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")._value
    except HydraException:
        return "none"
    kinds = {"quoted": QuotedString, "list": list, "mapping": dict, "sweep": Sweep}
    return next((name for name, kind in kinds.items() if isinstance(parsed, kind)), "plain")
