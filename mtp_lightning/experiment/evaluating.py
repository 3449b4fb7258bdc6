"""Measures a trained model: teacher-forced metrics, and those of the decoding loop."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data_modules.window_module import WindowDataModule
from mtp_lightning.callbacks.exact_match import answer_all
from mtp_lightning.callbacks.long_range import acceptance_on_long_texts
from mtp_lightning.callbacks.progress import with_bar
from mtp_lightning.command_line import check_config
from mtp_lightning.decoding.fused import fused_passes
from mtp_lightning.decoding.measure import decoding_report, prompts_that_fit
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.precision import check_precision, use_activations, use_precision
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.compose import overridden
from mtp_lightning.experiment.device import MIXED, kernels_line
from mtp_lightning.experiment.instantiate import rebuild, trusted_packages
from mtp_lightning.metrics.long_range import LongRange
from mtp_lightning.metrics.rates import rates_of
from mtp_lightning.model import MTPModel
from mtp_lightning.opening import OpenedModel, open_model
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.config import key_of
from mtp_lightning.run.layout import SUMMARY_FILE
from mtp_lightning.run.summary import environment, print_summary
from mtp_lightning.runtime import pick_accelerator, quiet_lightning, set_threads
from mtp_lightning.stored import NETWORK, is_cache, read_json, require_sizes, require_text

log = logging.getLogger(__name__)

# Values that a data group refers to, for a model that comes without a run's config.
_BARE = {
    "tokenizer": None,
    "trainer": {"accumulate_grad_batches": 1, "accelerator": "auto"},
    "init_from": None,
    "seed": 0,
    "paths": {"cache_dir": None},
}
# Keys of a data group that say how a task or a text is read, not which one. The examples of a task
# decide the length of its windows.
_HOW_TASK = {"batch_size", "eval_batch_size"}
_HOW = _HOW_TASK | {"seq_len", "eval_bytes", "document_mask", "val_fraction", "split_seed"}


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Compute and print a trained model's metrics on its own evaluation text or on other data.

    On the run's own text, machine and threads, they are the numbers that the run reported. A
    warning says that the text has changed since.

    Raises:
        UserError: the checkpoint is damaged or foreign, the data have no validation window, a
            Hugging Face folder comes without data, or the precision is not available.
        OSError: a file is missing.
    """
    quiet_lightning()
    check_config.check(OmegaConf.to_container(cfg), "evaluate")  # type: ignore[arg-type]
    check_precision(cfg.precision, cfg.head_precision, activations=cfg.activations)
    decoding = DecodingOptions.from_config(cfg.decode)
    allow = trusted_packages(cfg)
    run = open_model(cfg.checkpoint, device=pick_accelerator(cfg.accelerator), allow=allow)
    if cfg.decode.n_prompts and run.model.mtp.max_draft_depth != 0:
        decoding.max_draft(run.model)  # refuses what the model cannot draft
    use_precision(run.model, cfg.precision, cfg.head_precision)
    use_activations(run.model, cfg.activations)
    set_threads(run.threads if cfg.num_threads is None else cfg.num_threads)
    weight = run.model.head.weight
    if kernels := kernels_line(weight.device.type):
        print(kernels)
    cache_dir = cfg.paths.cache_dir
    data = validation_data(
        run, data=cfg.get("data"), eval_bytes=cfg.eval_bytes, cache_dir=cache_dir, allow=allow
    )
    evaluation = data.evaluation_summary()
    if cfg.get("data") is None and cfg.eval_bytes is None:
        with suppress(OSError, UserError, LookupError, TypeError):  # a run may have no summary yet
            summary = read_json(run.path.parents[1] / SUMMARY_FILE)
            if summary["evaluation"]["fingerprint"] != evaluation["fingerprint"]:
                log.warning(
                    "The run's evaluation text has changed since: these are not its own numbers."
                )
    as_decoded = fused_passes(run.model) if cfg.activations != "fp32" else nullcontext()
    rates = rates_of(run.model, data.evaluated_bytes).to(weight.device)
    with as_decoded:
        with precision_of(run), torch.inference_mode():
            for batch in with_bar(data.val_dataloader(), "evaluate"):
                batch = batch.to(weight.device)
                rates.update(run.model, batch, run.model(batch))
        measured = {
            **{f"val/{name}": value for name, value in rates.compute().items()},
            **answer_all(run.model, data.answer_sets),
            **evaluate_decoding(run.model, data, cfg.decode),
            **(evaluate_long_range(run, data, cfg) if cfg.long_range and data.has_text else {}),
        }
    metrics = {
        **measured,
        "parameters": run.model.config.num_params(),
        "parameters_trunk": run.model.config.num_trunk_params(),
        "step": run.step,
        "checkpoint": str(run.path),
        "evaluation": evaluation,
        "data": data.summary(),
        **environment(weight.device),
    }
    print_summary(metrics, depth=run.model.depth, own_text=cfg.get("data") is None)
    if cfg.output is not None:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(metrics, Path(cfg.output))
    return metrics


def precision_of(run: OpenedModel) -> AbstractContextManager[Any]:
    """The autocast context in which the run's trainer validates."""
    mixed = run.run_config.get("trainer", {}).get("precision") in MIXED
    return torch.autocast(run.model.head.weight.device.type, torch.bfloat16, enabled=mixed)


def evaluate_long_range(
    run: OpenedModel, data: WindowDataModule, cfg: DictConfig
) -> dict[str, float]:
    """Measure how far back the model looks, as ``callbacks=long_range`` does in training: by about
    two passes over the text, and by decoding ``decode.n_prompts`` texts of a window's length."""
    measure = LongRange(run.model, data.seq_len, data.tokenizer.token_bytes())
    with precision_of(run):
        for batch in with_bar(data.val_dataloader(), "long_range"):
            measure.update(batch.to(run.model.head.weight.device))
        metrics = {f"val/{name}": value for name, value in measure.compute().items()}
    texts = acceptance_on_long_texts(run.model, data, n_prompts=cfg.decode.n_prompts)
    return metrics | {f"decode/{name}": value for name, value in texts.items()}


def validation_data(
    run: OpenedModel,
    *,
    data: DictConfig | None = None,
    eval_bytes: int | str | None = None,
    cache_dir: str | None = None,
    allow: Collection[str] = (),
) -> WindowDataModule:
    """Prepare the evaluation text of a run, or other data with the run's tokenizer and settings.

    Args:
        data: the config group of the other data, which decides which text is read. The run decides
            how it is read (``data.seq_len``, ``data.val_fraction`` ...), except for keys that the
            command line sets.
        eval_bytes: bytes of evaluation text, or ``all``; None keeps the run's value.
        cache_dir: folder of the token stores. By default it is the run's, if that is a cache folder
            on this machine, else the default folder.
        allow: packages whose text sources may be built.

    Raises:
        UserError: a Hugging Face folder, which has no text, comes without other data; the stored
            config is damaged; or a setting does not fit.
    """
    stored = run.run_config.get("data")
    if not isinstance(stored, dict):
        raise UserError(f"{run.path} is damaged or forged: its data are {stored!r:.80}.")
    if data is None and "_target_" not in stored:
        raise UserError(
            f"{run.path} has no validation text of its own: give one, as data=text data.paths=FILE."
        )
    require_text(run.run_config, source=run.path)
    require_sizes(stored, source=run.path)
    config = OmegaConf.create({**_BARE, "mtp": run.model.config.mtp.to_dict(), **run.run_config})
    stored = config.data
    if data is not None:
        allow = [*allow, *NETWORK.values()]  # the user's own data group may use the network
        config.data = OmegaConf.to_container(data, resolve=False)
        typed = {key_of(override) for override in overridden("data")}
        shared_keys = _HOW_TASK if "task" in config.data else _HOW
        if config.data.get("val_paths") is not None:  # the validation documents are named
            shared_keys = shared_keys - {"val_fraction", "split_seed"}
        for key in shared_keys & stored.keys() & config.data.keys():
            if f"data.{key}" not in typed:
                config.data[key] = stored[key]
    if eval_bytes is not None:
        if "task" in config.data:
            raise UserError(
                f"eval_bytes={eval_bytes} has no meaning for a task: give it as data=..., with "
                "data.eval_examples."
            )
        config.data.eval_bytes = eval_bytes
    # The stored nodes. If the data group is the user's, its cache_dir stays as it is.
    for node in (config.paths, config.data) if data is None else (config.paths,):
        if "cache_dir" in node and (cache_dir or not is_cache(node.cache_dir or "")):
            node.cache_dir = cache_dir
    module: WindowDataModule = rebuild(
        config.data,
        kind=WindowDataModule,
        allow=allow,
        tokenizer=run.tokenizer,
        **run.model.config.mtp.data_options,
    )
    module.allow = allow
    module.prepare("validate")
    return module


def evaluate_decoding(
    model: MTPModel, data: WindowDataModule, settings: DictConfig
) -> dict[str, Any]:
    """Measure the drafts' acceptance and speed-up, and compute the expected ones. The result is
    ``not_decoded`` with the reason if no prompt fits, and empty without drafts."""
    if model.mtp.max_draft_depth == 0 or settings.n_prompts == 0 or data.answer_length == 1:
        return {}  # an answer of one token needs no draft
    sizes = {key: settings[key] for key in ("n_prompts", "prompt_tokens", "new_tokens")}
    try:
        prompts, new_tokens = prompts_that_fit(data, **sizes, key="decode.new_tokens")
    except UserError as error:  # the teacher-forced metrics are still worth reporting
        log.warning("Nothing was decoded: %s.", error)
        return {"not_decoded": str(error)}
    options = DecodingOptions.from_config(settings, max_new_tokens=new_tokens)
    report = decoding_report(model, prompts, options, tokenizer=data.tokenizer)
    return {f"decode/{name}": value for name, value in report.items()}
