"""From a run to a folder that transformers and servers read, or to a GGUF file for llama.cpp,
checked before it is called done."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mtp_lightning.command_line import check_config
from mtp_lightning.command_line.shell import program
from mtp_lightning.errors import UserError
from mtp_lightning.interop import card, gguf_writing, speculators
from mtp_lightning.interop.conversion import has_layout
from mtp_lightning.interop.gguf_dflash import DFLASH
from mtp_lightning.interop.gguf_eagle3 import EAGLE3
from mtp_lightning.interop.tensor_files import CONFIG, read_json
from mtp_lightning.interop.transformers_model import import_transformers
from mtp_lightning.interop.verify import (
    check_bytes,
    check_tokenizer,
    check_trained,
    check_with_transformers,
    rounded,
)
from mtp_lightning.interop.writing import DTYPES, write_folder
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.opening import OpenedModel, draft_vocab_of, open_model
from mtp_lightning.run.folder import claimed
from mtp_lightning.run.layout import SUMMARY_FILE

_DRAFTERS = {drafter.name: drafter for drafter in (EAGLE3, DFLASH)}


def export(cfg: Any) -> Path:
    """Write the folder or the GGUF file that ``conf/export.yaml`` asks for, and verify it.

    It is in the folder ``.NAME.partial``, which one process holds at a time, until it is complete
    and verified.

    Raises:
        UserError: an option out of range, a model that no layout fits.
        CheckFailed: the written folder or file is not the model.
        OSError: a missing checkpoint, an output folder that is not empty, or another export to it.
    """
    check_config.check(OmegaConf.to_container(cfg), "export")  # type: ignore[arg-type]
    target = Path(cfg.output)
    as_file, apart = target.suffix.lower() == ".gguf", cfg.layout == speculators.LAYOUT
    _require_possible(cfg, target, as_file=as_file, apart=apart)
    run = open_model(cfg.checkpoint, allow=cfg.allow)
    model = _model_to_write(run, cfg, as_file=as_file, apart=apart)
    final = target.resolve()
    folder = final.with_name(f".{final.name}.partial")
    with claimed(folder, option="output", seconds=0):
        try:
            # Another export to it may have ended meanwhile.
            _require_possible(cfg, target, as_file=as_file, apart=apart)
            partial = folder / final.name
            shutil.rmtree(partial, ignore_errors=True)  # of a killed export
            (_fill_file if as_file else _fill)(partial, target, run, model, cfg)
            partial.replace(final)
            if as_file:
                _card_of(partial).replace(_card_of(final))
        finally:  # also after a failed check, a full disk or Ctrl-C
            shutil.rmtree(folder, ignore_errors=True)
    if cfg.layout == "own" and run.tokenizer.kind != "symbols":
        allowed = f" 'allow=[{','.join(cfg.allow)}]'" if cfg.allow else ""
        typed = shlex.quote(str(target))
        print(f"text: {program('generate')} checkpoint={typed}{allowed} prompt='...'")
    return target


def _require_possible(cfg: Any, target: Path, *, as_file: bool, apart: bool) -> None:
    """Refuse options that cannot be fulfilled."""
    if cfg.depth not in (None, 0):
        raise UserError(f"depth={cfg.depth}: give 0 to leave the MTP modules out, or null.")
    if os.path.ismount(target):
        raise UserError(f"output={target} is a mounted folder: give a new folder inside it.")
    if any("\ud800" <= letter <= "\udfff" for letter in str(target.resolve())):
        raise UserError(f"output={target} is not UTF-8, as libraries need it: choose another name.")
    if as_file and (cfg.max_positions or 0) >= 1 << 32:
        raise UserError(f"max_positions={cfg.max_positions} must be below 2^32 in a GGUF file.")
    if as_file and cfg.shard_gb is not None:
        raise UserError(f"shard_gb={cfg.shard_gb}: a GGUF file is a single one, so leave it out.")
    for file in (target, _card_of(target)) if as_file else ():
        if file.exists():
            raise FileExistsError(f"{file} exists: choose another output= or remove it.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"output={target} is not empty: choose another folder or clear it.")
    if cfg.dtype == "q8_0" and not as_file:
        raise UserError("dtype=q8_0 is for a GGUF file: give output=NAME.gguf, or another dtype.")
    if apart and (as_file or cfg.depth == 0):
        other = f"output={target} is a single file" if as_file else "depth=0 leaves the heads out"
        raise UserError(
            f"layout={cfg.layout} writes the heads into a folder inside the trunk's, and {other}: "
            "leave out one of the two."
        )
    if cfg.layout in _DRAFTERS and (not as_file or cfg.depth == 0):
        raise UserError(
            f"layout={cfg.layout} writes the drafter alone: give output=NAME.gguf, and no depth."
        )
    if cfg.verify and not as_file:
        import_transformers()


def _model_to_write(run: OpenedModel, cfg: Any, *, as_file: bool, apart: bool) -> MTPModel:
    """The run's model, or its trunk alone; prints what is left out."""
    model, mtp = run.model, run.model.config.mtp
    if obstacle := mtp.export_obstacle():
        raise UserError(f"a model of mtp={mtp.variant} {obstacle}: it cannot be exported.")
    if apart:
        speculators.kind(model.config)  # refuses before anything is written
    if apart or cfg.depth == 0:
        model = trunk_alone(model)
    elif not mtp.predicts_tokens:
        model = trunk_alone(model)
        print(
            f"mtp={mtp.variant} shaped the trunk in training and is of no use "
            "without it: the trunk is exported alone."
        )
    if mtp.confidence and cfg.depth is None and (as_file or apart or has_layout(run.model.config)):
        print(
            "The estimates of acceptance (objective.confidence) are left out: no layout has them."
        )
    return model


def _fill(partial: Path, folder: Path, run: OpenedModel, model: MTPModel, cfg: Any) -> None:
    """Write and verify ``folder`` under its temporary name ``partial``. With ``layout=speculators``
    ``model`` is the trunk alone, and the heads of ``run`` go into a folder inside."""
    max_positions = cfg.max_positions or run.seq_len
    contents = write_folder(
        partial,
        model,
        run.tokenizer,
        dtype=cfg.dtype,
        max_positions=max_positions,
        shard_bytes=int((cfg.shard_gb or 5) * 1e9),
        draft_vocab=draft_vocab_of(run.run_config),
    )
    apart = cfg.layout == speculators.LAYOUT
    drafting = run.model if apart else model
    if apart:
        n_values = speculators.write(
            partial,
            drafting,
            verifier=folder.resolve(),
            dtype=DTYPES[cfg.dtype],
            max_positions=max_positions,
            eot_id=run.tokenizer.eot_id,
        )
        parameters = contents.parameters + n_values
        contents = replace(contents, heads=speculators.FOLDER, parameters=parameters)
    kind = read_json(partial / CONFIG)["model_type"]
    old_card, old = Path(cfg.checkpoint) / card.FILE, Path(cfg.checkpoint) / CONFIG
    fields = read_json(old) if old.is_file() else {}
    same_dtype = (fields.get("torch_dtype") or fields.get("dtype")) == cfg.dtype
    if cfg.depth is None and not apart and same_dtype and old_card.is_file():
        shutil.copyfile(old_card, partial / card.FILE)
    else:
        facts = {"model_type": kind, "dtype": cfg.dtype, **_training(run)}
        text = card.render(folder.name, drafting.config, contents, **facts)
        (partial / card.FILE).write_text(text, encoding="utf-8")
    print(f"{folder}: {contents.parameters:,} numbers in {contents.shards} file(s) of weights")
    extra = "" if apart else contents.heads
    if apart:
        print(
            f"the heads are in {speculators.FOLDER} inside it, which names {folder.resolve()} as "
            "its verifier: change that in its config.json when the folder moves."
        )
    elif extra:
        print(
            f"mtp={model.config.mtp.variant} with these switches has no layout that transformers "
            f"knows: the trunk is exported plainly, the heads in {extra} next to it."
        )
    for sentence in card.readers_of(model.config, kind, contents.modules, extra=extra):
        print(sentence)
    _verify(folder, cfg, _check_seed(run, drafting), _check_folder(partial, run, model, cfg.dtype))


def _fill_file(partial: Path, file: Path, run: OpenedModel, model: MTPModel, cfg: Any) -> None:
    """Write and verify ``file`` under its temporary name ``partial``, and write its card."""
    options = {"dtype": cfg.dtype, "max_positions": cfg.max_positions or run.seq_len}
    kind: Any = _DRAFTERS.get(cfg.layout, gguf_writing)
    if kind is gguf_writing:
        options["draft_vocab"] = draft_vocab_of(run.run_config)
    written = kind.write_file(partial, model, run.tokenizer, name=file.stem, **options)
    print(f"{file}: {written.parameters:,} numbers, architecture {written.arch}")
    for sentence in written.notes:
        print(sentence)
    checks = kind.check_file(partial, model, run.tokenizer, cfg.dtype)
    _verify(file, cfg, _check_seed(run, model), checks)
    text = card.render(file.stem, model.config, written, dtype=cfg.dtype, **_training(run))
    _card_of(partial).write_text(text, encoding="utf-8")


def _card_of(file: Path) -> Path:
    return file.with_suffix(".md")


def _verify(target: Path, cfg: Any, *checks: Iterator[str]) -> None:
    """Run checks, which yield their results, and print them."""
    if not cfg.verify:
        print(f"NOT VERIFIED: verify=false left out the check that {target} is the model.")
        return
    for line in chain(*checks):
        print(f"  {line}")
    print("verified")


def _check_seed(run: OpenedModel, model: MTPModel) -> Iterator[str]:
    """Check that training has changed the weights of a run, which are random at first."""
    if run.step and "seed" in run.run_config and any(p.requires_grad for p in model.parameters()):
        lambdas = run.run_config.get("mtp_lambda", 0)
        weights = lambdas if isinstance(lambdas, list) else [lambdas] * model.depth
        yield check_trained(model, run.run_config["seed"], weights)


def _check_folder(folder: Path, run: OpenedModel, model: MTPModel, dtype: str) -> Iterator[str]:
    yield check_bytes(folder, model, dtype=dtype)
    yield check_tokenizer(folder, run.tokenizer)
    yield from check_with_transformers(folder, rounded(model, dtype))
    if (folder / speculators.FOLDER).is_dir():
        yield speculators.check(folder, run.model, DTYPES[dtype])


def trunk_alone(model: MTPModel) -> MTPModel:
    """A copy of a model's trunk without its MTP stack, in evaluation mode; its parameters need
    gradients only if the stack trained the trunk."""
    trunk = MTPModel(ModelConfig(trunk=model.config.trunk, mtp=NoMTPConfig()))
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")}
    trunk.load_state_dict(weights)
    return trunk.requires_grad_(model.config.mtp.trains_trunk).eval()


def _training(run: OpenedModel) -> dict[str, Any]:
    """The card's facts about the training; the summary.json is that of the checkpoint's run."""
    files = [folder / SUMMARY_FILE for folder in (run.path.parent, run.path.parent.parent)]
    summary = next((read_json(file) for file in files if file.is_file()), None)
    stack = run.model.config.mtp
    return {"mtp": stack, "step": run.step, "run_config": run.run_config, "summary": summary}
