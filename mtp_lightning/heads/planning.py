"""Divides a number of hours for a model: texts to generate, steps to train, disk and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mtp_lightning.chat_template import ChatTemplate
from mtp_lightning.command_line.quote import quoted
from mtp_lightning.decoding.fused import multiply_integers
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.compose import checked_config
from mtp_lightning.experiment.instantiate import instantiate
from mtp_lightning.experiment.trunk_states import cache_obstacle
from mtp_lightning.heads.timing import fastest_precision, other_seconds, writing_speed
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.objective.cost import StepCost
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.opening import OpenedModel, open_model, read_model
from mtp_lightning.run.config import key_of
from mtp_lightning.runtime import pick_accelerator
from mtp_lightning.settings import require_whole
from mtp_lightning.stored import LARGEST

# Bytes of PyTorch's and transformers' code.
_IMPORTS = 0.4e9
# Shares of the hours that the later phases leave: texts and the trunk's states of them, and steps.
# The rest is for start-up and validations.
_TEXTS, _TRAINING = 0.45, 0.35
_BATCH = 8
_PROMPT, _NEW, _WINDOW = 32, 88, 128
_FEWEST, _FEWEST_STEPS = 64, 10  # texts, of which some are held out, and steps
# Number of first token ids that the modules are trained on, if the vocabulary has at least four
# times as many: the head of a small model is most of a step's work.
_VOCAB = 4096
# Peak learning rate of new modules (the claim heads_rate) up to a width of the trunk; above it, the
# rate falls as 1 / d_model (Yang et al. 2022, arXiv 2203.03466). Trained modules have a quarter.
_RATE, _WIDTH = 0.004, 576
# Share of the texts of a chat model that are chats, and the temperature of all.
_CHATS, _TEMPERATURE = 0.6, 0.8


@dataclass(frozen=True, kw_only=True)
class HeadsPlan:
    """The use of a number of hours."""

    model: str  # path of the model, absolute
    hours: float  # hours of this machine, for everything
    window: int  # tokens of a training window, which a generated text fills
    files: list[str]  # the user's text files, instead of generated texts
    weights: int  # number of the model's weights
    overrides: list[str]  # further settings of training, as typed
    context: int  # the most positions of the model, which the export states
    depth: int  # number of modules that are trained
    switches: list[str]  # the settings of modules that the model has; empty for new ones
    rate: float  # peak learning rate
    draft_vocab: int | None  # number of first token ids that modules are trained on; None for all
    # The chat format's texts before a question, and between it and the answer; empty for a model
    # without one.
    chat: list[str]
    chat_share: float  # share of the texts that are chats
    # Numbers that are always valid, until the hours are divided.
    batch: int = _BATCH  # windows of a step
    texts: int = 1000  # number of texts to generate; 0 if files of text are given
    steps: int = 1000  # optimizer steps
    tokens_per_second: float = 0.0  # measured generation speed; 0 with files
    flops_per_second: float = 0.0  # measured FLOP/s of the forward pass in ``precision``
    head: str = "sequential"  # the kind of the modules, as in ``mtp=``
    head_weights: int = 0  # number of the modules' weights
    embedding: int = 0  # number of the embedding's weights
    sources: list[str] = field(default_factory=list)  # the cache keys of the model's files
    precision: str = "32-true"  # of training, as in ``trainer.precision``
    activations: str = "fp32"  # precision of the activations while the model writes texts
    cache_states: bool = True  # whether the trunk's states of all texts are kept on disk
    state_bytes: int = 0  # their size
    writing: float = 0.0  # hours for the texts and the trunk's states of them
    training: float = 0.0  # hours for the steps
    others: float = 0.0  # hours for the phases after training

    def lines(self) -> Iterator[str]:
        """The plan in sentences, printed before training."""
        yield f"model      {self.model}: {_count(self.weights)} weights"
        head = f"one {self.head} module" if self.depth == 1 else f"{self.depth} {self.head} modules"
        yield f"head       {head} of {_count(self.head_weights)} weights"
        if self.files:
            yield f"text       {', '.join(self.files)}"
        else:
            chats = f" ({self.chat_share:.0%} of them chats)" if self.chat_share else ""
            yield (
                f"text       {self.texts:,} texts{chats} that the model writes itself and then "
                f"reads, about {_minutes(self.writing)} at {self.tokens_per_second:,.0f} "
                f"tokens per second with activations={self.activations}"
            )
        yield (
            f"training   {self.steps:,} steps of {self.batch * self.window:,} tokens, about "
            f"{_minutes(self.training)} at {self.flops_per_second / 1e9:,.0f} GFLOP/s in "
            f"{self.precision}, with learning rate {self.rate:.2g}"
            + (f", on the first {self.draft_vocab:,} tokens alone" if self.draft_vocab else "")
        )
        validating = (self.writing + self.training) * (1 / (_TEXTS + _TRAINING) - 1)
        yield f"validation up to {_minutes(validating)}"
        if self.others:  # estimated from another machine's
            yield f"others     about {_minutes(self.others)} for start, certificate, export, timing"
        # The check of the export holds four models: the run's, its rounded copy, its first weights
        # and transformers' own. Training holds one, a packed one, and the module's moments.
        memory = _IMPORTS + 4 * (4 * self.weights + 4 * self.head_weights)
        # Three checkpoints with the module's moments, and the export, in which most layouts repeat
        # embedding and head for every module.
        stored = 4 * self.weights + 10 * self.head_weights + 2 * self.depth * self.embedding
        disk = 4 * stored + self.state_bytes
        yield f"needs      {_bytes(memory)} of memory, {_bytes(disk)} of disk"
        hours = self.writing + self.training + validating + self.others
        over = f", more than --hours={self.hours:g}" if hours > 1.02 * self.hours else ""
        yield f"time       about {_minutes(hours)} in all on this machine{over}"

    def train(self) -> list[str]:
        """The overrides of train.py."""
        if self.files:
            data = ["data=text", f"data.paths=[{','.join(map(quoted, self.files))}]"]
        else:
            n_new = self.window * _NEW // (_PROMPT + _NEW)  # the prompt fills the window with them
            data = [
                "data=self_generated",
                f"data.n_prompts={self.texts}",
                f"data.prompt_tokens={self.window - n_new}",
                f"data.new_tokens={n_new}",
                f"data.temperature={_TEMPERATURE}",
                f"data.activations={self.activations}",
                f"data.cache_states={str(self.cache_states).lower()}",
            ]
            if self.chat:
                before, after = map(quoted, self.chat)
                data += [f"data.chat_share={self.chat_share}", f"data.chat_before={before}"]
                data += [f"data.chat_after={after}"]
        return [
            "experiment=posthoc_heads",
            f"init_from={self.model}",
            f"mtp.depth={self.depth}",
            *self.switches,
            "objective=kl",
            *([f"objective.draft_vocab={self.draft_vocab}"] if self.draft_vocab else []),
            *data,
            f"data.seq_len={self.window}",
            f"data.batch_size={self.batch}",
            f"optimizer.lr={self.rate:.2g}",
            f"trainer.max_steps={self.steps}",
            f"trainer.val_check_interval={max(self.steps // 4, 1)}",
            f"trainer.precision={self.precision}",
            *self.overrides,
        ]

    def as_in(self, cfg: Any) -> HeadsPlan:
        """The plan with the settings of a config, which the overrides may have changed."""
        return replace(
            self,
            depth=cfg.mtp.depth,
            window=cfg.data.seq_len,
            batch=cfg.data.batch_size,
            texts=cfg.data.get("n_prompts", 0),
            steps=cfg.trainer.max_steps,
            rate=cfg.optimizer.lr,
            precision=cfg.trainer.precision,
            activations=cfg.data.get("activations", "fp32"),
            draft_vocab=cfg.objective.draft_vocab,
            chat_share=cfg.data.get("chat_share", 0.0),
        )


def _count(n: int) -> str:
    return f"{n:,}" if n < 1e6 else f"{n / 1e6:,.1f} M"


def _bytes(n: float) -> str:
    return f"{n / 1e6:,.0f} MB" if n < 1e8 else f"{n / 1e9:,.1f} GB"


def _minutes(hours: float) -> str:
    minutes = max(round(60 * hours), 1)
    return "a minute" if minutes == 1 else f"{minutes:,} minutes"


def plan(
    path: Path, *, hours: float, files: list[str], overrides: list[str], further: bool = False
) -> HeadsPlan:
    """Look at the model and the machine for some seconds, and divide the hours; arguments as of
    :class:`HeadsPlan`. With ``further``, the model's own sequential modules are trained further.

    Raises:
        UserError: a model that cannot be opened, has heads already or none to train on, or too few
            hours.
    """
    if not read_model(path).brings_trunk:
        raise UserError(
            f"{path} is a run of this project: write it as a folder by mtp-lightning export "
            f"checkpoint={path} output=FOLDER depth=0, and give that folder."
        )
    device = pick_accelerator("auto")
    look = partial(_plan, device, path, hours, files, overrides, further)
    if device == "cpu":
        return look()
    # A process of its own gives the GPU back, which training needs.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(look).result()


def _plan(
    device: str, path: Path, hours: float, files: list[str], overrides: list[str], further: bool
) -> HeadsPlan:
    """:func:`plan` by a look at the model on a device."""
    run = open_model(path, device=device)
    mtp = run.model.config.mtp
    _require_trainable(path, mtp, further)
    kept = [f"mtp.{name}={getattr(mtp, name)}" for name in mtp.meaning]
    sketch = _sketch(run, hours, files, overrides, ["mtp.init=random", *kept] if further else [])
    cfg = checked_config(sketch.train())
    config = ModelConfig(trunk=run.model.config.trunk, mtp=instantiate(cfg.mtp, kind=MTPConfig))
    require_whole("mtp.depth", config.mtp.depth, least=1)
    sketch = _fitting(sketch, config)
    cfg = checked_config(sketch.train())
    costs = _costs(run, sketch.as_in(cfg), config, cfg.data, on_cpu=device == "cpu")
    steps, texts = _divided(sketch, costs)
    final = replace(
        sketch, steps=steps, texts=texts, precision=costs.precision, activations=costs.activations
    )
    final = final.as_in(checked_config(final.train()))
    d_model, kept_texts = config.trunk.d_model, final.texts if cfg.data.cache_states else 0
    return replace(
        final,
        tokens_per_second=costs.writing_rate,
        flops_per_second=costs.flops_per_second,
        head=config.mtp.variant,
        head_weights=config.num_params() - sketch.weights,
        embedding=config.trunk.vocab_size * d_model,
        state_bytes=int(4 * kept_texts * costs.text_tokens * d_model),
        writing=final.texts * costs.text / 3600,
        training=final.steps * costs.step / 3600,
        others=costs.others / 3600,
    )


def _sketch(
    run: OpenedModel, hours: float, files: list[str], overrides: list[str], switches: list[str]
) -> HeadsPlan:
    """The plan before the hours are divided. With ``switches`` the model's modules are trained
    further."""
    config = run.model.config
    window = min(_WINDOW, run.seq_len)
    chat = [] if files else _chat(run, window)
    return HeadsPlan(
        model=str(run.path.resolve()),
        hours=hours,
        window=window,
        files=files,
        weights=config.num_trunk_params(),
        overrides=overrides,
        context=run.seq_len,
        depth=max(config.mtp.depth, 1),
        switches=switches,
        rate=_RATE * min(_WIDTH / config.trunk.d_model, 1) / (4 if switches else 1),
        draft_vocab=_VOCAB if config.trunk.vocab_size >= 4 * _VOCAB else None,
        chat=chat,
        chat_share=_CHATS if chat else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """What the parts of a plan cost on this machine."""

    step: float  # seconds of an optimizer step
    others: float  # seconds of the phases after training
    precision: str  # the fastest one to train in
    flops_per_second: float  # of reading windows in it
    # Of a text that the model writes; 0 if files of text are given.
    text: float = 0.0  # seconds, those of reading it for the trunk's states included
    text_tokens: float = 0.0
    writing_rate: float = 0.0  # tokens per second
    activations: str = "fp32"  # precision of the activations while the model writes


def _costs(
    run: OpenedModel, sketch: HeadsPlan, config: ModelConfig, data: Any, *, on_cpu: bool
) -> _Costs:
    """Measure what a step and a text cost; ``data`` are the settings of ``data=``."""
    cost = StepCost(config, Objective(term=KL(), draft_vocab=sketch.draft_vocab))
    with_trunk, with_stored = (
        cost(sketch.window, range(1, sketch.depth + 1), main=False, stored=stored)
        for stored in (False, True)
    )
    precision, speed = fastest_precision(run, min(_WINDOW, run.seq_len), on_cpu=on_cpu)
    costs = _Costs(
        step=(with_stored if data.cache_states else with_trunk) * sketch.batch / speed,
        # After training, a graft is only exported.
        others=0.0 if sketch.switches else other_seconds(sketch.weights, speed),
        precision=precision,
        flops_per_second=speed,
    )
    if sketch.files:
        return costs
    activations = "fp32"
    # After the speed is measured, since it changes the model's products.
    may_round = on_cpu and "data.activations=fp32" not in sketch.overrides
    if may_round and multiply_integers(run.model) is None:
        activations = "int8"
    rate = writing_speed(run)
    n_around = sum(len(run.tokenizer.encode_specials(text)) for text in sketch.chat)
    n_tokens = data.prompt_tokens + data.new_tokens + data.chat_share * n_around
    seconds = (data.new_tokens + data.chat_share * data.prompt_tokens) / rate
    if data.cache_states:  # the trunk reads every text once
        seconds += (with_trunk - with_stored) * n_tokens / sketch.window / speed
    return replace(
        costs, text=seconds, text_tokens=n_tokens, writing_rate=rate, activations=activations
    )


def _divided(sketch: HeadsPlan, costs: _Costs) -> tuple[int, int]:
    """The steps and the texts that the hours hold; refuses too few hours."""
    seconds = 3600 * sketch.hours
    seconds = max(seconds - costs.others, seconds / 2)  # at least half of the hours
    training_share = _TRAINING + (_TEXTS if sketch.files else 0)
    steps = int(seconds * training_share / costs.step)
    texts = int(seconds * _TEXTS / costs.text) if costs.text else 0
    texts = min(texts, LARGEST["n_prompts"])
    overridden = {key_of(word) for word in sketch.overrides}
    least = max(
        0 if "trainer.max_steps" in overridden else _FEWEST_STEPS * costs.step / training_share,
        0 if "data.n_prompts" in overridden else _FEWEST * costs.text / _TEXTS,
    )
    if least > seconds:
        enough = 1.1 * min(least + costs.others, 2 * least) / 3600
        held, needed = f"{steps} steps", f"{_FEWEST_STEPS}"
        if costs.text:
            held, needed = f"{held} and {texts} texts", f"{needed} and {_FEWEST}"
        raise UserError(
            f"--hours={sketch.hours:g} holds {held} of this model on this machine, and heads need "
            f"{needed}: give --hours={enough:.2g}."
        )
    return steps, texts


def _fitting(sketch: HeadsPlan, config: ModelConfig) -> HeadsPlan:
    """The sketch without settings that the heads of the overrides have no use for."""
    model, mtp = config.on_meta(), config.mtp
    shortens = not (mtp.trains_trunk or mtp.depths_are_mixed) and model.head_of(1) is model.head
    return replace(
        sketch,
        draft_vocab=sketch.draft_vocab if shortens else None,
        cache_states=not cache_obstacle(model),
    )


def _require_trainable(path: Path, mtp: MTPConfig, further: bool) -> None:
    """Refuse a model that has heads, unless they are to be trained further and can be."""
    if further and not isinstance(mtp, SequentialConfig):
        raise UserError(f"{path} has heads of mtp={mtp.variant}, which are not trained on here.")
    if mtp.depth and not further:
        raise UserError(
            f"{path} has MTP heads already: examine them with mtp-lightning doctor (in a GGUF "
            f"file: certify), or train them further with mtp-lightning train init_from={path}."
        )


def _chat(run: OpenedModel, window: int) -> list[str]:
    """The texts around a chat's question; none without format or room."""
    try:
        template = ChatTemplate.of(run.tokenizer_state)
    except UserError as error:
        print(f"{run.path}: {error} No text is a chat.", file=sys.stderr)
        return []
    if template is None or (around := template.around()) is None:
        return []
    n = sum(len(run.tokenizer.encode_specials(text)) for text in around)
    return list(around) if window + n <= run.seq_len else []
