"""Verifies that a folder is the model it was made from: tensors, logits of all depths, and text.

Other exporters have written 0 of 15 MTP tensors with exit code 0, and modules in their initial
state. So the folder is read back twice: as bytes, and with transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.errors import UserError
from mtp_lightning.interop import stack_file
from mtp_lightning.interop.config_json import STANDS_FOR
from mtp_lightning.interop.conversion import has_extra_file, in_layers, to_folder
from mtp_lightning.interop.reading import contents, describe
from mtp_lightning.interop.tensor_files import CONFIG, read_json
from mtp_lightning.interop.transformers_model import Loaded, briefly, import_transformers, quiet
from mtp_lightning.interop.writing import DTYPES
from mtp_lightning.model import MTPModel
from mtp_lightning.weights import Stored

# Logits in float32 may differ by the first number, or by this share of the largest logit.
TOLERANCE, ROUNDING = 1e-4, 2e-5
TEXT = "def main():\n\treturn 'caf\u00e9 \u2013 \u65e5\u672c'  # 1, 2, 345\n"
_BATCH, _LENGTH, _PROMPT, _NEW = 2, 32, 8, 24


class CheckFailed(UserError):
    """A folder is not the model that it was made from; the message names the tensor."""


def check_trained(model: MTPModel, seed: int, weights: list[float]) -> str:
    """Checks that every trained tensor differs from its initialization; returns one line about it.
    ``weights`` are the lambdas of all depths: a module that none above 0 reaches is not trained.

    Raises:
        CheckFailed: if a tensor does not differ.
    """
    fresh = MTPModel(model.config)
    fresh.initialize(seed)
    active = [k for k, weight in enumerate(weights, start=1) if weight]
    steps = {0, *model.mtp.with_prerequisites(active)}
    start = dict(fresh.named_parameters())
    trained = 0
    for name, parameter in model.named_parameters():
        depth = int(name.split(".")[2]) + 1 if name.startswith("mtp.depths.") else 0
        if not parameter.requires_grad or depth not in steps:
            continue
        if torch.equal(parameter.detach().cpu(), start[name].detach()):
            raise CheckFailed(
                f"{name} is exactly as seed {seed} initialized it, although the run trained it: "
                "its weights were lost before this checkpoint, or its lambda was 0."
            )
        trained += 1
    return f"{trained} trained tensors differ from their initialization"


def check_bytes(folder: Path, model: MTPModel, *, dtype: str) -> str:
    """Checks that the folder's tensors are the model's, each rounded once; see
    :func:`check_tensors`."""
    wanted = to_folder(model, in_layers(model.config), DTYPES[dtype])
    _, unread = contents(folder)
    tensors = {name: part.read() for name, part in unread.items()}
    if has_extra_file(model.config):
        wanted |= stack_file.tensors(model, DTYPES[dtype])
        _, stack = stack_file.read(folder, model.config.trunk)
        tensors |= {n: p.tensor() if isinstance(p, Stored) else p for n, p in stack.items()}
    return f"{check_tensors(tensors, wanted, folder)} tensors are the model's"


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path) -> int:
    """Checks that tensors of a folder have the wanted names and values; returns their number.

    Raises:
        CheckFailed: a tensor is missing, unknown or different; the message names it.
    """
    check_names(tensors, wanted, folder)
    for name, tensor in wanted.items():
        if not torch.equal(tensors[name].float(), tensor.float()):
            raise CheckFailed(f"{name} in {folder} is not the model's tensor.")
    return len(wanted)


def check_names(names: Iterable[str], wanted: Collection[str], path: Path) -> None:
    """Checks that the tensors at a path have the wanted names.

    Raises:
        CheckFailed: a name is missing or unknown.
    """
    if different := sorted({*names} ^ {*wanted}):
        name = different[0]
        raise CheckFailed(f"{name} is {'missing' if name in wanted else 'unknown'} in {path}.")


def rounded(model: MTPModel, dtype: str) -> MTPModel:
    """A float32 copy of a model, rounded to the values that a folder of ``dtype`` holds."""
    twin = copy.deepcopy(model).cpu().float().eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.to(DTYPES[dtype]))
    return twin


def sample_of(tokenizer: Any) -> tuple[str, list[int]]:
    """A text that a tokenizer reads, and its ids."""
    text = TEXT if tokenizer.reads_text else tokenizer.decode(range(tokenizer.vocab_size))
    return text, tokenizer.encode(text).tolist()


def check_tokenizer(folder: Path, tokenizer: Any) -> str:
    """Checks that transformers reads the folder's tokenizer as ``tokenizer``.

    Raises:
        CheckFailed: if it gives other ids.
        UserError: if transformers is missing.
    """
    transformers = import_transformers()
    text, wanted_ids = sample_of(tokenizer)
    for reader in ("AutoTokenizer", "PreTrainedTokenizerFast"):
        kind = getattr(transformers, reader)
        try:
            with quiet(transformers):
                # Else AutoTokenizer asks whether to run code that tokenizer_config.json names.
                options = {"local_files_only": True, "trust_remote_code": False}
                theirs = kind.from_pretrained(folder, **options)
                ids = theirs(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # a tokenizer_config.json from elsewhere may have any values
            problem = f"cannot be read: {briefly(error)}"
            continue
        if ids == wanted_ids and theirs.eos_token_id == tokenizer.eot_id:
            # For Qwen2's model type, AutoTokenizer splits text by a rule of its own.
            only = "" if reader == "AutoTokenizer" else f" in {reader}, but not in AutoTokenizer"
            return f"tokenizer.json gives the same {len(wanted_ids)} ids for a text{only}"
        problem = (
            f"gives other ids: {ids[:8]}... with end of text {theirs.eos_token_id}, not "
            f"{wanted_ids[:8]}... and {tokenizer.eot_id}"
        )
    raise CheckFailed(f"In transformers, the tokenizer in {folder} {problem}.")


def check_with_transformers(folder: Path, model: MTPModel) -> Iterator[str]:
    """Checks that transformers computes the same from a folder as ``model``, which is the folder's
    with its values, on the CPU.

    Yields:
        The results, one line each.

    Raises:
        CheckFailed: for tensors that transformers misses or does not know, or for different logits
            or tokens.
        UserError: if transformers is missing.
    """
    stored, extra = describe(folder), stack_file.is_there(folder)
    trunk, mtp = stored.config.trunk, stored.config.mtp
    kind = read_json(folder / CONFIG)["model_type"]
    foreign = kind in STANDS_FOR and mtp.depth > 0
    depth = 0 if extra or foreign else mtp.depth
    theirs = Loaded(folder, model_type=kind, n_layers=trunk.n_layers, depth=depth)
    for problem, names in (("is missing", theirs.missing), ("is not expected", theirs.unexpected)):
        if names:
            raise CheckFailed(f"{names[0]} {problem} in {folder}, transformers says.")

    generator = torch.Generator().manual_seed(0)
    ahead = model.config.mtp.stride * model.depth + 1
    tokens = torch.randint(trunk.vocab_size, (_BATCH, _LENGTH + ahead), generator=generator)
    own_logits = _logits(model, tokens)
    for k, their_logits in enumerate(theirs.logits(tokens[:, : _LENGTH + depth])):
        worst = (their_logits - own_logits[k]).abs().max().item()
        where = "trunk" if k == 0 else f"MTP depth {k}"
        allowed = max(TOLERANCE, ROUNDING * own_logits[k].abs().max().item())
        if not worst <= allowed:  # also true for NaN
            layer = "" if k == 0 else f" (model.layers.{trunk.n_layers + k - 1}.*)"
            raise CheckFailed(
                f"The logits of the {where}{layer} differ by {worst:.2e} between transformers and "
                f"this project; at most {allowed:.0e} is allowed."
            )
        yield f"logits of the {where} equal transformers' (largest difference {worst:.1e})"
    if foreign:
        yield "transformers has no MTP layers of this layout: these were not compared"
    if extra:
        where = stack_file.where(model.config)
        for k, logits in enumerate(_logits(stored.build(), tokens)):
            if not torch.equal(logits, own_logits[k]):
                raise CheckFailed(f"depth {k} of {where}, read back, gives other logits.")
        yield f"{where}, read back, gives the same logits at every depth"
    yield from _check_text(theirs, model, tokens[0, :_PROMPT])


@torch.inference_mode()
def _logits(model: MTPModel, tokens: Tensor) -> list[Tensor]:
    hidden = model(WindowBatch(tokens, model.depth, stride=model.config.mtp.stride))
    return [model.head_of(k)(h_BTC) for k, h_BTC in hidden.items()]


def _check_text(theirs: Loaded, model: MTPModel, prompt: Tensor) -> Iterator[str]:
    own = {False: generate(model, [prompt], max_new_tokens=_NEW, speculative=False)[0]}
    if theirs.depth:
        own[True] = generate(model, [prompt], max_new_tokens=_NEW)[0]
    wanted = own[False].token_ids
    for use_mtp, text in own.items():
        ids, passes = theirs.greedy(prompt, _NEW, use_mtp=use_mtp)
        if ids != wanted:
            i = next(i for i, token in enumerate(wanted) if ids[i : i + 1] != [token])
            raise CheckFailed(
                f"generate(use_mtp={use_mtp}) of transformers differs from this project's plain "
                f"greedy decoding at new token {i}: {ids[i : i + 1]} instead of {wanted[i]}."
            )
        yield (
            f"generate(use_mtp={use_mtp}) decodes the same {_NEW} tokens "
            f"(passes of the trunk: {passes}, here {1 + text.verify_passes})"
        )
