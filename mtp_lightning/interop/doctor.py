"""``python doctor.py FOLDER``: are a checkpoint's MTP layers complete, trained, and read correctly?

Three questions, from the outside in: which tensors exist (``inventory.py``), which convention the
weights match, and how many of their drafts the trunk accepts. Systems differ in the state that
depth 1 reads (before or after the trunk's final norm) and in the order in which the projection
reads state and embedding. The wrong convention does not crash: it only drafts worse. So every
convention is tried on the same text, which the trunk generates.

The command is ``mtp_lightning/apps/doctor.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.sequence import rates
from mtp_lightning.errors import UserError
from mtp_lightning.interop import config_reading, stack_file
from mtp_lightning.interop.agreement import (
    ABOVE,
    Convention,
    agreement_of_conventions,
    clearly_best,
    described,
    most_common_share,
    own_texts,
    prompts_of,
)
from mtp_lightning.interop.conversion import from_folder
from mtp_lightning.interop.inventory import UNUSABLE, Module, take_inventory
from mtp_lightning.interop.reading import contents, describe
from mtp_lightning.interop.tensor_files import CONFIG, StoredTensor
from mtp_lightning.interop.weight_map import module_layout, weight_map
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.opening import OpenedModel, draft_vocab_of, pretrained_state
from mtp_lightning.weights import StoredModel, require_held

_FIRST = "acceptance_position_1"  # the rate of first drafts that the trunk accepts


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The findings in a folder."""

    folder: Path
    layout: str = "no MTP tensors"  # the layout of its MTP tensors' names, in words
    verdict: str = ""  # one sentence
    sound: bool = False  # whether the verdict is that all is well
    # The tensors of every depth; empty for heads in a file of this project.
    modules: list[Module] = field(default_factory=list)
    meant: Convention | None = None  # the layout's convention; None for heads that have none
    # The convention that the weights match: the layout's, unless another is clearly better.
    best: Convention | None = None
    # By convention, the share of positions at which depth 1's choice is the trunk's.
    agreement: dict[Convention, float] = field(default_factory=dict)
    constant: float = 0.0  # the share that always choosing the most common token would get
    # Share of first drafts accepted in the real loop, greedy, under the layout's convention; None
    # if nothing was decoded.
    acceptance: float | None = None

    def lines(self) -> list[str]:
        """All findings, for a terminal."""
        report = [f"layout      {self.layout}"]
        for module in self.modules:
            report.append(f"depth {module.depth}     {module}")
            for state, names in module.lost.items():
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                report.append(f"            {state}: {shown}")
        for convention, share in self.agreement.items():
            mark = "  <- the layout's" if convention == self.meant else ""
            report.append(f"agreement   {share:6.1%}  {described(convention)}{mark}")
        if self.constant:
            report.append(f"            {self.constant:6.1%}  the same token everywhere")
        if self.acceptance is not None:
            report.append(f"accepted    {self.acceptance:6.1%}  of first drafts, decoding greedily")
        return [*report, "", self.verdict]


def examine(path: str | Path, *, new_tokens: int = 64, allow: Collection[str] = ()) -> Diagnosis:
    """Examines a folder in Hugging Face's layout.

    Args:
        new_tokens: tokens that the trunk generates after each of four beginnings, to measure on.
        allow: packages whose variants the folder's file of heads may ask for.

    Raises:
        FileNotFoundError: if there is no config.json, or no weights.
        UserError: for a trunk that cannot be read.
    """
    path = Path(path)
    if stack_file.is_there(path):
        return _examine_heads(path, new_tokens, allow)
    fields, parts = contents(path)
    declared = config_reading.declared_depth(fields)
    trunk = config_reading.from_json(fields, depth=declared or 1, source=str(path / CONFIG))
    layout = module_layout(fields["model_type"])
    stored = _stored_depth(layout.prefix(trunk.n_layers, 0), parts)
    if max(declared, stored) > len(parts):
        raise UserError(
            f"{path} is damaged or forged: it has {max(declared, stored):,} MTP layers, and "
            f"{len(parts):,} tensors."
        )
    require_held(ModelConfig(trunk=trunk, mtp=NoMTPConfig()), parts, source=str(path))
    if not stored:
        reason = (
            f"declares {declared} MTP layer(s) and holds none of their tensors: they were lost "
            f"when it was written; mtp-lightning doctor graft BASE {path} adds those of a base."
            if declared
            else "holds no MTP tensors and declares no MTP layers: there is nothing to draft "
            f"with; mtp-lightning heads {path} trains a head."
        )
        return Diagnosis(folder=path, verdict=f"{path} {reason}")
    config = ModelConfig(trunk=trunk, mtp=layout.of_depth(max(declared, stored)))
    modules = take_inventory(config, parts)
    lost = next(((m, state, names) for m in modules for state, names in m.lost.items()), None)
    title = f"{layout.title} ({layout.prefix(trunk.n_layers, 0)}* ..)"
    diagnosis = Diagnosis(folder=path, layout=title, modules=modules)
    if not modules[0].lost.keys() & {"missing", "misshapen"}:  # depth 1 can be built
        # Without the other depths, and copies of embedding and head, which are checked already.
        prefixes = [layout.prefix(trunk.n_layers, k) for k in range(config.mtp.depth)]
        unread = [*prefixes[1:], f"{prefixes[0]}embed_tokens.", f"{prefixes[0]}shared_head.head."]
        needed = {name: part for name, part in parts.items() if not name.startswith(tuple(unread))}
        drafts = draft_vocab_of(config_reading.run_config(fields, path))
        diagnosis = _measure(diagnosis, config, needed, new_tokens, drafts, whole=lost is None)
    read = config_reading.read_depth(fields)
    return _conclude(diagnosis, *_judge(diagnosis, read, stored, lost))


def _conclude(diagnosis: Diagnosis, sound: bool, reason: str) -> Diagnosis:
    verdict = f"{diagnosis.folder} is {'' if sound else 'not '}sound: {reason}."
    return replace(diagnosis, verdict=verdict, sound=sound)


def _stored_depth(prefix: str, tensors: Collection[str]) -> int:
    """Number of depths with any tensor in the folder; ``prefix`` is that of depth 1."""
    stem, _, first = prefix.removesuffix(".").rpartition(".")
    layers = (re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in tensors)
    return max([0, *(int(layer[1]) - int(first) + 1 for layer in layers if layer)])


def _measure(
    diagnosis: Diagnosis,
    config: ModelConfig,
    parts: dict[str, StoredTensor],
    new_tokens: int,
    draft_vocab: int | None,
    *,
    whole: bool,
) -> Diagnosis:
    """The diagnosis with depth 1's drafts under every convention, and their acceptance."""
    first = ModelConfig(trunk=config.trunk, mtp=replace(config.mtp, depth=1))
    weights = from_folder(weight_map(first), parts, source=str(diagnosis.folder))
    model = StoredModel(
        path=diagnosis.folder, config=first, weights=weights, tokenizer_state=None
    ).build()
    prompts = _prompts(diagnosis.folder, model)
    texts = own_texts(model, prompts, new_tokens)
    assert isinstance(first.mtp, SequentialConfig)
    meant = (first.mtp.input_norm, first.mtp.concat)
    agreement = agreement_of_conventions(model, texts, draft_vocab)
    drafted = []
    if whole:
        drafted = generate(model, prompts, max_new_tokens=new_tokens, draft_vocab=draft_vocab)
    return replace(
        diagnosis,
        meant=meant,
        best=clearly_best(agreement.rights, meant),
        agreement=agreement.shares,
        constant=agreement.constant,
        acceptance=rates(drafted).get(_FIRST) if whole else None,
    )


def _prompts(folder: Path, model: MTPModel) -> list[list[int]]:
    """Beginnings of texts, as ids of the folder's tokenizer if it has one."""
    if not (folder / "tokenizer.json").is_file():
        return prompts_of(model, None)
    state = pretrained_state(folder)
    opened = OpenedModel(
        model=model, tokenizer_state=state, run_config={}, step=0, path=folder, brings_trunk=True
    )
    return prompts_of(model, opened.tokenizer)


def _judge(
    diagnosis: Diagnosis, read: int, stored: int, lost: tuple[Module, str, list[str]] | None
) -> tuple[bool, str]:
    """Whether the folder is sound, and the reason."""
    if lost is not None:
        module, state, names = lost
        return False, (
            f"{len(names)} of {len(module.states)} tensors of MTP depth {module.depth} "
            f"{UNUSABLE[state]} ({names[0]}{', ...' if len(names) > 1 else ''})"
        )
    if stored != read:
        return False, (
            f"readers expect {read} MTP layer(s) by its config.json, and it has tensors of {stored}"
        )
    return _judge_drafts(diagnosis, stored)


def _judge_drafts(diagnosis: Diagnosis, depth: int) -> tuple[bool, str]:
    meant, best, shares = diagnosis.meant, diagnosis.best, diagnosis.agreement
    assert meant is not None and best is not None
    if shares[best] <= diagnosis.constant + ABOVE:
        return False, (
            f"its {depth} MTP layer(s) are there, but under no convention do they agree with the "
            f"trunk more often than one token everywhere does ({shares[best]:.1%}, and "
            f"{diagnosis.constant:.1%} with one token)"
        )
    if best != meant:
        return False, (
            f"its weights were trained on {described(best)} (agreement {shares[best]:.1%}), but "
            f"its layout gives them {described(meant)} ({shares[meant]:.1%})"
        )
    accepted = ""
    if diagnosis.acceptance is not None:
        accepted = f", and the trunk accepts {diagnosis.acceptance:.1%} of their first drafts"
    return True, (
        f"its {depth} MTP layer(s) are complete and trained, and match their layout's "
        f"convention, {described(meant)} (agreement {shares[meant]:.1%}){accepted}"
    )


def _examine_heads(path: Path, new_tokens: int, allow: Collection[str]) -> Diagnosis:
    """Examines heads in this project's file, which describe themselves."""
    stored = describe(path, allow=allow)
    model, drafts = stored.build(), draft_vocab_of(stored.run_config)
    texts = generate(model, _prompts(path, model), max_new_tokens=new_tokens, draft_vocab=drafts)
    acceptance = rates(texts).get(_FIRST)
    constant = most_common_share(torch.tensor([i for text in texts for i in text.token_ids]))
    layout = f"mtp-lightning's {stack_file.where(model.config)} (mtp={model.config.mtp.variant})"
    diagnosis = Diagnosis(folder=path, layout=layout, acceptance=acceptance, constant=constant)
    sound = acceptance is not None and acceptance > constant
    accepted = "no" if acceptance is None else f"{acceptance:.1%} of their first"
    more = "" if sound else f", and {constant:.1%} of its tokens are one and the same"
    return _conclude(diagnosis, sound, f"the trunk accepts {accepted} drafts{more}")
