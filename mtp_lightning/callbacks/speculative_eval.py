"""Decodes held-out prompts at each validation, plainly and speculatively: real acceptance."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import Generation, generate
from mtp_lightning.model import MTPModel

log = logging.getLogger(__name__)

# Two tokens whose logits differ by less are a tie: rounding may choose either.
_TIE = 1e-3


class SpeculativeEval(Callback):
    """Logs ``decode/acceptance_position_j``, ``decode/tokens_per_step``, ``decode/speedup`` and
    ``decode/tokens_per_second``.

    Acceptance at position j is conditional: drafts accepted there / drafts that reached it.
    Tokens per step are the tokens emitted by verify passes / verify passes, the model's own token
    included. Speed-up is the wall-clock of plain over that of speculative greedy decoding, one
    prompt at a time: a figure of this machine at this moment, as tokens per second are, which
    compare models of different sizes too. Greedy outputs that differ stop the run. The first
    prompt's continuation is logged as text.

    A model without drafts (D = 0, or a head that does not draft) logs the text, and tokens per
    second of plain decoding.

    Args:
        n_prompts: held-out prompts, >= 1.
        prompt_tokens: their length, >= 1.
        new_tokens: tokens to add to each, >= 2.
    """

    def __init__(self, n_prompts: int = 4, prompt_tokens: int = 32, new_tokens: int = 64) -> None:
        for name, value, least in (
            ("n_prompts", n_prompts, 1),
            ("prompt_tokens", prompt_tokens, 1),
            ("new_tokens", new_tokens, 2),
        ):
            if value < least:
                raise ValueError(
                    f"callbacks.speculative_eval.{name} must be at least {least}, not {value}."
                )
        self.n_prompts = n_prompts
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decode, compare, log; by the first process alone."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        model, data = pl_module.model, trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(model, MTPModel)
        room = data.seq_len - self.new_tokens
        if room < 1:
            return  # the window is shorter than what would be decoded
        try:
            prompts = data.held_out_prompts(self.n_prompts, min(self.prompt_tokens, room))
        except ValueError as error:  # a small corpus can be trained on all the same
            log.warning("No decoding at validation: %s.", error)
            return
        options: dict[str, Any] = {
            "max_new_tokens": self.new_tokens,
            "tokenizer": data.tokenizer,
            "batch_size": 1,
        }
        plain, plain_seconds = _timed(model, prompts, speculative=False, **options)
        text = f"{data.tokenizer.decode(prompts[0].tolist())}|{plain[0].text}"
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                logger.log_text("decode/sample", text, trainer.global_step)
        if not model.mtp.drafts:
            pl_module.log_dict(_speed(plain, plain_seconds), rank_zero_only=True)
            return
        drafted, seconds = _timed(model, prompts, speculative=True, **options)
        for prompt, expected, found in zip(prompts, plain, drafted, strict=True):
            require_same_greedy(model, prompt.tolist(), expected.token_ids, found.token_ids)
        values = {**rates(drafted), **_speed(drafted, seconds)}
        values["decode/speedup"] = plain_seconds / seconds
        pl_module.log_dict(values, rank_zero_only=True)


def rates(generations: list[Generation]) -> dict[str, float]:
    """Acceptance by position and tokens per step, pooled over the generations."""
    accepted = torch.tensor([g.drafts_accepted for g in generations]).sum(0)
    reached = torch.tensor([g.drafts_reached for g in generations]).sum(0)
    values = {
        f"decode/acceptance_position_{j}": float(a / n)
        for j, (a, n) in enumerate(zip(accepted, reached, strict=True), start=1)
        if n
    }
    passes = sum(g.verify_passes for g in generations)
    if passes:
        emitted = sum(g.tokens_per_step * g.verify_passes for g in generations)
        values["decode/tokens_per_step"] = emitted / passes
    return values


def require_same_greedy(
    model: MTPModel, prompt: list[int], expected: list[int], found: list[int]
) -> None:
    """Drafts must not change what is said.

    Raises:
        RuntimeError: the outputs differ where the model was not undecided between two tokens.
    """
    if expected == found:
        return
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    if at < min(len(expected), len(found)):
        # One row is enough, read as in training; the tokens that pad it are never looked at.
        read = torch.tensor([prompt + expected[:at] + [0] * (model.depth + 1)])
        with torch.inference_mode():
            batch = WindowBatch(read.to(model.head.weight.device), model.depth)
            logits = model.head(model(batch, ())[0][0, -1]).float()
        if abs(float(logits[expected[at]] - logits[found[at]])) < _TIE:
            return
    raise RuntimeError(
        f"Speculative greedy decoding differs from plain decoding at new token {at} after the "
        f"prompt {prompt}: {expected[at : at + 4]} against {found[at : at + 4]}. This is a "
        "defect in the decoder: please report it with the checkpoint."
    )


def _speed(generations: list[Generation], seconds: float) -> dict[str, float]:
    return {"decode/tokens_per_second": sum(g.new_tokens for g in generations) / seconds}


def _timed(
    model: MTPModel, prompts: list[torch.Tensor], **options: Any
) -> tuple[list[Generation], float]:
    began = time.perf_counter()
    generations = generate(model, prompts, **options)
    return generations, time.perf_counter() - began
