"""A trained model's metrics: teacher-forced, and of the decoding loop."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from data_modules.windows import WindowBatch
from mtp_lightning.callbacks.long_range import acceptance_on_long_texts
from mtp_lightning.decoding.measure import decoding_report
from mtp_lightning.experiment.instantiate import rebuild, trusted_packages
from mtp_lightning.interop.reading import open_run
from mtp_lightning.metrics.long_range import LongRange
from mtp_lightning.metrics.rates import DepthRates, bits_per_byte
from mtp_lightning.model import MTPModel
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.loading import LoadedRun
from mtp_lightning.run.summary import environment, print_summary
from mtp_lightning.runtime import pick_accelerator, quiet_lightning, set_threads
from mtp_lightning.settings import require_whole

if TYPE_CHECKING:
    from data_modules import TokenDataModule

log = logging.getLogger(__name__)

# What a data group refers to, where the model comes without a run's config.
_BARE = {
    "tokenizer": None,
    "trainer": {"accumulate_grad_batches": 1},
    "seed": 0,
    "paths": {"cache_dir": None},
}


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Metrics of a trained model, on its own validation text or on other data: teacher-forced, and
    of the decoding loop.

    Raises:
        ValueError: a damaged or foreign checkpoint, data without a validation window, or a Hugging
            Face folder without data.
        OSError: a missing file.
    """
    quiet_lightning()
    set_threads(cfg.num_threads)
    allow = trusted_packages(cfg)
    run = open_run(cfg.checkpoint, device=pick_accelerator(cfg.accelerator), allow=allow)
    data = validation_data(run, data=cfg.get("data"), cache_dir=cfg.paths.cache_dir, allow=allow)
    rates = evaluate_model(run.model, data.val_dataloader(), limit=cfg.limit_batches)
    per_byte = bits_per_byte(rates["loss_depth_0"], data.bytes_per_token("val"))
    metrics = {
        **{f"val/{name}": value for name, value in rates.items()},
        "val/bits_per_byte": per_byte,
        **evaluate_decoding(run.model, data, cfg.decode),
        **(evaluate_long_range(run.model, data, cfg) if cfg.long_range else {}),
        "parameters": run.model.config.num_params(),
        "parameters_trunk": run.model.config.trunk.num_params(),
        "flops_per_token": run.model.config.flops_per_token(data.seq_len),
        "step": run.step,
        "checkpoint": str(run.path),
        "data": data.summary(),
        **environment(),
    }
    print_summary(metrics, depth=run.model.depth)
    if cfg.output is not None:
        write_json(metrics, Path(cfg.output))
    return metrics


@torch.inference_mode()
def evaluate_model(
    model: MTPModel, batches: Iterable[WindowBatch], *, limit: int | None = None
) -> dict[str, float]:
    """Loss, accuracy, agreement and overlap of every depth; see :class:`DepthRates`.

    Args:
        model: in evaluation mode.
        batches: windows built for the model's depth.
        limit: at most so many batches; None for all.

    Raises:
        ValueError: no batch, or one of another depth.
    """
    device = model.head.weight.device
    rates = DepthRates(model.depth).to(device)
    for batch in islice(batches, limit):
        moved = batch.to(device)
        rates.update(model(moved), model.head.weight, moved)
    if not rates.update_called:
        raise ValueError("There is nothing to evaluate: the data gave no batch.")
    return rates.compute()


def evaluate_long_range(
    model: MTPModel, data: TokenDataModule, cfg: DictConfig
) -> dict[str, float]:
    """How far back the model looks, as ``callbacks=long_range`` measures it in training: about two
    passes over the text, and ``decode.n_prompts`` texts of a window's length."""
    measure = LongRange(model, data.seq_len, data.tokenizer.token_bytes())
    for batch in islice(data.val_dataloader(), cfg.limit_batches):
        measure.update(batch.to(model.head.weight.device))
    found = {f"val/{name}": value for name, value in measure.compute().items()}
    texts = acceptance_on_long_texts(model, data, n_prompts=cfg.decode.n_prompts)
    return found | {f"decode/{name}": value for name, value in texts.items()}


def validation_data(
    run: LoadedRun,
    *,
    data: DictConfig | None = None,
    cache_dir: str | None = None,
    allow: Collection[str] = (),
) -> TokenDataModule:
    """The validation text of a run, or that of another data group in the run's setting.

    Args:
        run: its tokenizer reads the text.
        data: the other group.
        cache_dir: where token stores are; by default where the run's are.
        allow: packages whose text sources may be built.

    Raises:
        ValueError: a Hugging Face folder, which has no text of its own, without other data.
    """
    if data is None and "_target_" not in run.config["data"]:
        raise ValueError(
            f"{run.path} has no validation text of its own: give one, as data=text data.paths=FILE."
        )
    config = OmegaConf.create({**_BARE, "mtp": {"depth": run.model.depth}, **run.config})
    if data is not None:
        config.data = OmegaConf.to_container(data, resolve=False)
    config.paths.cache_dir = cache_dir or config.paths.cache_dir
    # Also with the user's data, whose keys follow what was stored: seed, mtp.depth.
    module = rebuild(config.data, allow=allow, tokenizer=run.tokenizer)
    module.prepare("validate")
    return module


def evaluate_decoding(
    model: MTPModel, data: TokenDataModule, settings: DictConfig
) -> dict[str, float]:
    """Acceptance and speed-up of the drafts, measured and expected; nothing without drafts.

    Raises:
        ValueError: settings out of range.
    """
    for key, least in (("n_prompts", 0), ("prompt_tokens", 1), ("new_tokens", 2)):
        require_whole(f"decode.{key}", settings[key], least=least)
    if model.mtp.max_draft_depth == 0 or settings.n_prompts == 0:
        return {}
    try:
        prompts = data.held_out_prompts(settings.n_prompts, settings.prompt_tokens)
    except ValueError as error:  # the teacher-forced metrics are there all the same
        log.warning("Nothing was decoded (%s): lower decode.n_prompts or prompt_tokens.", error)
        return {}
    report = decoding_report(model, prompts, new_tokens=settings.new_tokens)
    return {f"decode/{name}": value for name, value in report.items()}
