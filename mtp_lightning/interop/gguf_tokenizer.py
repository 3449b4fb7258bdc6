"""A tokenizer in a GGUF file: BPE as llama.cpp knows it, and the whole tokenizer.json.

llama.cpp splits a text into words by its own rules, and a file only names one of them. The writer
names the rule that gives this tokenizer's ids for the most sample texts, and reports the
difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.interop import gguf_sentencepiece

# The key of GGUF's specification for the whole tokenizer.json.
WHOLE = "tokenizer.huggingface.json"
_ROLES = ("bos", "eos", "padding")
_MORE_ENDS = ("eot", "eom")  # the end of a turn, and of a message
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}
_CASES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> dict[str, Any]:
    parts = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Split", **parts}


_LLAMA3 = _sequence(_split(rf"{_CASES}\p{{N}}{{1,3}}{_REST}"), _BYTES)
# llama.cpp's rules by their names, as the tokenizers library writes them.
_RULES = {
    "gpt-2": _GPT2,
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _GPT2),
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _sequence(_split(rf"{_CASES}\p{{N}}{_REST}"), _BYTES),
    "deepseek-v3": _sequence(
        _split(r"\p{N}{1,3}"), _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
        _split(_SIGNS), _BYTES,
    ),
}  # fmt: skip
# The rule with which a word that is a token is not merged.
_UNMERGED = "llama-bpe"
# Other names of these rules.
_BEGUN = ("llama3", "llama-v3", "falcon3", "pixtral")
_ALIASES = {
    **dict.fromkeys(
        ("phi-2", "jina-es", "jais", "mpt", "olmo", "trillion", "granite-docling"), "gpt-2"
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "exaone", "codeshell", "minerva-7b"), "smollm"
    ),
    **dict.fromkeys((*_BEGUN, "glm4"), "llama-bpe"),
    **dict.fromkeys(("chatglm-bpe", "dbrx"), "smaug-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
}
# Rules with which llama.cpp begins a text with the beginning-of-text token, unless the file says
# otherwise.
_BEGINNING = ("llama-bpe", *_BEGUN, "tekken")
# The ids that end a text, where there are more than llama.cpp has keys or names for.
_ENDS = "mtp_lightning.end_token_ids"
# Tokens that end a text in llama.cpp, whatever the file's keys say (special_eog_ids in its
# src/llama-vocab.cpp).
_END_NAMES = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>",
    "<|end_of_text|>", "<end_of_utterance>", "[EOT]", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip
# llama.cpp also ends a text at these roles; where no key names a token, its name decides.
_FILLING = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Names that end a part of a text in a vocabulary that has a token of each of these sets.
_PARTS = {
    "<|end|>": ({"<|call|>", "<|calls|>"}, {"<|return|>", "<|flush|>"}),
    "</s>": ({"<|tool_response>"},),
}
_SAMPLE = """def read_lines(path, max_size=1024):
    with open(path) as file:
        return [line.rstrip("\\n") for line in file][:max_size]
\tif (x_1 >= 20 && !done) { total += 3.14159; }
for i in range(100, 2000):  # don't stop

The history of the city begins with the river, which isn't long (about 12345 m).
"Well," she said, "we're late; I'd say it's 7:45."
HTML <a href="https://example.com/a_b?c=1&d=%20">it's</a>
Caf\u00e9 cr\u00e8me, na\u00efve r\u00e9sum\u00e9 \u2013 \u201cquoted\u201d \u2026 1\u00bd
\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!
\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \u4f60\u597d 123
snake_case_name CamelCaseName SCREAMING_CASE __init__ a1b2c3 2^10 x**2
  two   spaces    and\ttabs\t\tbetween  words  """
_LINES = [*_SAMPLE.split("\n"), _SAMPLE]


def to_fields(tokenizer: Any, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The values of the tokenizer's keys, and sentences about what differs in llama.cpp.

    Args:
        tokenizer: with ``library_json()``, ``eot_id``, ``special_ids()`` and maybe ``beside``.
        vocab_size: rows of the embedding; ids beyond the tokenizer's are unused.

    Raises:
        UserError: it is neither a byte-level BPE nor one of SentencePiece's.
    """
    text = tokenizer.library_json()
    content = json.loads(text)
    model = content["model"]
    byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise UserError(
            f"a {tokenizer.kind} tokenizer of the type {model.get('type')} cannot be written as "
            "GGUF here, only BPE of bytes or with a fallback to bytes: export the model as a "
            "folder."
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for piece, i in model["vocab"].items():
        tokens[i], types[i] = piece, _NORMAL
    for token in content.get("added_tokens") or ():
        i = token["id"]
        tokens[i], types[i] = token["content"], _CONTROL if token["special"] else _USER
    fields: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": tokenizer.eot_id,
        WHOLE: text,
    }
    if byte_level:
        rule, equal = _nearest(text, content)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        fields |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": rule,
            # llama.cpp wants at least one: a merge to no token of the vocabulary changes nothing.
            "tokenizer.ggml.merges": merges or ["~ ~"],
        }
    else:
        spaced = tokens[_ids(text, ["a"])[0][0]].startswith("\u2581")
        fields |= gguf_sentencepiece.to_fields(model, tokens, types, spaced=spaced)
        rule, equal = "SentencePiece", _n_equal(text, _tokenizer_json(fields.get, tokens) or text)
    for name, i in zip(_MORE_ENDS, tokenizer.end_ids[1:], strict=False):
        fields[f"tokenizer.ggml.{name}_token_id"] = i
    specials = tokenizer.special_ids()
    begin = specials.get("bos_token_id")
    if begin is not None:
        fields["tokenizer.ggml.bos_token_id"] = begin
    if "pad_token_id" in specials:
        fields["tokenizer.ggml.padding_token_id"] = specials["pad_token_id"]
    begins = [int(i) for i in tokenizer.encode_prompt("")[:1]]
    fields["tokenizer.ggml.add_bos_token"] = begin is not None and begins == [begin]
    from mtp_lightning.chat_template import source_of  # jinja2, which only an export needs

    if template := source_of(getattr(tokenizer, "beside", {})):
        fields["tokenizer.chat_template"] = template
    notes = []
    if equal < len(_LINES):
        notes.append(
            f"llama.cpp has no rule that splits text as this tokenizer does: with its rule {rule}, "
            f"{equal} of {len(_LINES)} sample texts get the same token ids. The model's tokens are "
            "the same; a client that needs the model's own ids sends ids instead of text."
        )
    known = _ends(fields.get, tokens)
    if others := [tokens[i] for i in tokenizer.end_ids if i not in known]:
        fields[_ENDS] = list(tokenizer.end_ids)
        notes.append(
            f"llama.cpp ends no text with {', '.join(others)}, since a file names three such "
            "tokens there; this project does."
        )
    return fields, notes


def _nearest(text: str, content: dict[str, Any]) -> tuple[str, int]:
    """The rule that splits most like a tokenizer, and how many sample texts get the same ids."""
    model, equal = content["model"], {}
    for name, rule in _RULES.items():
        theirs = {"pre_tokenizer": rule, "normalizer": None}
        theirs["model"] = {**model, "ignore_merges": name == _UNMERGED}
        equal[name] = _n_equal(text, json.dumps({**content, **theirs}))
    unmerged = bool(model.get("ignore_merges"))
    name = max(equal, key=lambda name: (equal[name], (name == _UNMERGED) == unmerged))
    return name, equal[name]


def _n_equal(text: str, other: str) -> int:
    """The number of sample texts that have the same ids with two tokenizers."""
    pairs = zip(_ids(text, _LINES), _ids(other, _LINES), strict=True)
    return sum(a == b for a, b in pairs)


def _ids(text: str, lines: list[str]) -> list[list[int]]:
    """The ids of lines by a tokenizer.json, which was checked when the tokenizer was read."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(text)
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True
    return [library.encode(line, add_special_tokens=False).ids for line in lines]


def unpack(get: Callable[[str], Any], folder: Path) -> bool:
    """Write the tokenizer.json that a file holds or describes into a folder, with the files next to
    it; ``get`` returns the content of a key of the file, None if it is not there. Return whether
    there is a tokenizer that can be read without transformers."""
    whole, tokens = get(WHOLE), get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return False
    if not isinstance(whole, str):
        whole = _tokenizer_json(get, tokens)
    # Without a class, AutoTokenizer splits text by Qwen2's rule in a folder of Qwen3's layout.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role in _ROLES:
        i = get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            config[f"{'pad' if role == 'padding' else role}_token"] = tokens[i]
    if isinstance(begins := get("tokenizer.ggml.add_bos_token"), bool):
        config["add_bos_token"] = begins
    generation = {"eos_token_id": _ends(get, tokens)}
    files = {
        "tokenizer.json": whole,
        "tokenizer_config.json": json.dumps(config),
        "generation_config.json": json.dumps(generation),
        "chat_template.jinja": get("tokenizer.chat_template"),
    }
    for name, text in files.items():
        if isinstance(text, str):
            (folder / name).write_text(text, encoding="utf-8")
    return whole is not None


def _ends(get: Callable[[str], Any], tokens: list[str]) -> list[int]:
    """The ids that end a text: those of this project's key, and those of llama.cpp's keys and
    names."""
    ids, kept = {token: i for i, token in enumerate(tokens)}, get(_ENDS)
    ends = [get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", *_MORE_ENDS)]
    ends += sorted(ids[name] for name in _END_NAMES & ids.keys())
    for role, names in _FILLING.items():
        named = next((ids[name] for name in names if name in ids), None)
        key = get(f"tokenizer.ggml.{role}_token_id")
        ends.append(named if key is None else key)
    parts = [ids.get(n) for n, near in _PARTS.items() if all(ids.keys() & names for names in near)]
    ends = [*(kept if isinstance(kept, list) else ()), *(i for i in ends if i not in parts)]
    return list(dict.fromkeys(i for i in ends if isinstance(i, int)))


def _tokenizer_json(get: Callable[[str], Any], tokens: list[str]) -> str | None:
    """The tokenizer.json that gives the ids that llama.cpp gives. None for a kind of tokenizer, or
    a rule, that is not known here."""
    types, model = get("tokenizer.ggml.token_type"), get("tokenizer.ggml.model")
    if not isinstance(types, list) or len(types) != len(tokens):
        types = [_NORMAL] * len(tokens)
    parts = (gguf_sentencepiece.bpe_parts if model == "llama" else _byte_level)(get, tokens, types)
    if parts is None:
        return None
    begin, begins = get("tokenizer.ggml.bos_token_id"), get("tokenizer.ggml.add_bos_token")
    if begins is None:
        begins = model == "llama" or get("tokenizer.ggml.pre") in _BEGINNING
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": kind == _CONTROL, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER)
        ],
        "post_processor": (
            _starting_with(tokens[begin], begin)
            if begins and isinstance(begin, int) and begin in range(len(tokens))
            else None
        ),
        **parts,
    }
    return json.dumps(content)


def _byte_level(
    get: Callable[[str], Any], tokens: list[str], types: list[int]
) -> dict[str, Any] | None:
    """The parts of a byte-level BPE with the rule that the file names. (transformers would split
    every file's text by GPT-2's rule.)"""
    merges, name = get("tokenizer.ggml.merges"), get("tokenizer.ggml.pre")
    if isinstance(name, str):
        name = _ALIASES.get(name, name)
    rule = _RULES.get(name) if isinstance(name, str) else None
    if get("tokenizer.ggml.model") != "gpt2" or rule is None or not isinstance(merges, list):
        return None
    typed_tokens = enumerate(zip(tokens, types, strict=True))
    return {
        "pre_tokenizer": rule,
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, (token, kind) in typed_tokens if kind != _UNUSED},
            "merges": merges,
            "ignore_merges": name == _UNMERGED,
        },
    }


def _starting_with(token: str, i: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }
