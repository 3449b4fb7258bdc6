"""Malicious values in every place where a stored value is read (``stored.py``).

A value is refused in one sentence or kept as text. In no case is the environment read, a socket
opened, a file written elsewhere, code executed or much memory used.
"""

from __future__ import annotations

import copy
import functools
import json
import resource
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_lightning.errors import UserError
from mtp_lightning.interop.gguf_reader import read_header
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.opening import open_model
from mtp_lightning.run.loading import model_config
from mtp_lightning.weights import require_held
from tests.integration.helpers import checkpoint
from tests.interop import folders
from tests.models import build

SECRET = "a-token-of-the-environment"
ATTACKS: dict[str, Any] = {
    "interpolation": "${oc.env:MTP_SECRET}",
    "path": "../outside",
    "absolute path": "/proc/self/environ",
    "URL": "http://localhost:9/rows.parquet",
    "hub name": "somebody/evil",
    "size": 10**12,
    "more digits than a float has": 10**400,
    "not a number": float("nan"),
    "negative": -1,
    "word": "many",
    "nothing": None,
    "list": [1, 2],
    "markup": "x | <img src=q onerror=alert(1)> ![](http://localhost:9/p)",
    "class": {"_target_": "os.mkdir", "path": "outside"},
    "hub tokenizer": {
        "_target_": "data_modules.tokenizers.PretrainedTokenizer",
        "path": "somebody/evil",
    },
    "rows of a URL": {
        "_target_": "data_modules.sources.HuggingFaceSource",
        "path": "parquet",
        "data_files": "http://localhost:9/rows.parquet",
    },
    "logger": {"_target_": "mtp_lightning.loggers.csv.MetricsCSV", "folder": "outside"},
}


opened = functools.cache(open_model)
stored_checkpoint = functools.cache(checkpoint)


@pytest.fixture(autouse=True)
def bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No sockets, no files elsewhere, and at most half a gigabyte of additional memory."""
    opened = []

    def refuse(*address: Any, **_: Any) -> None:
        opened.append(address)
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setenv("MTP_SECRET", SECRET)
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "own-cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (1 << 29)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    left = {path.name for path in (*tmp_path.iterdir(), *(tmp_path / "work").iterdir())}
    assert "outside" not in left, "something was written elsewhere"
    assert opened == [], "a socket was opened"


def set_at(content: Any, path: str, value: Any) -> Any:
    """A copy with another value at a dotted key."""
    changed = at = copy.deepcopy(content)
    *parents, last = path.split(".")
    for key in parents:
        at = at[int(key) if isinstance(at, list) else key]
    at[int(last) if isinstance(at, list) else last] = value
    return changed


def of_config(key: str, finished: Path, value: Any, folder: Path) -> object:
    """The config in a checkpoint: the run is evaluated."""
    from mtp_lightning.experiment.evaluating import validation_data

    run = opened(finished)
    changed = replace(run, run_config=set_at(run.run_config, key, value))
    data = validation_data(changed)
    return next(iter(data.val_dataloader())).tokens.shape, data.evaluation_summary()


def of_model(key: str, finished: Path, value: Any, folder: Path) -> object:
    """The description of a model in a checkpoint."""
    content = stored_checkpoint(finished)
    plain = {"model_config": content["model_config"]}
    changed = set_at(plain, f"model_config.{key}", value)
    found = model_config({**content, **changed}, source=folder)
    require_held(found, content["state_dict"], source=str(folder))
    return found


def of_tokenizer(key: str, finished: Path, value: Any, folder: Path) -> object:
    """A tokenizer's state in a checkpoint, or its ``tokenizer.json`` in that."""
    from data_modules.tokenizers import ByteTokenizer, tokenizer_from_state

    library = json.loads(ByteTokenizer().library_json())
    state = {"kind": "pretrained", "path": "x", "eot_token": "<|endoftext|>", "beside": {}}
    if key.startswith("json."):
        library = set_at(library, key.removeprefix("json."), value)
    state["tokenizer_json"] = json.dumps(library)
    state = state if key.startswith("json.") else set_at(state, key, value)
    tokenizer = tokenizer_from_state(state)
    return tokenizer.vocab_size, len(tokenizer.token_bytes()), tokenizer.encode("abc").tolist()


def of_sweep(key: str, finished: Path, value: Any, folder: Path) -> object:
    """A sweep's plan: a worker makes its jobs."""
    from sweeps.devices import DeviceQueue
    from sweeps.lease import Leases
    from sweeps.plan import SweepPlan
    from sweeps.work import SweepWorker

    job = {"folder": "a", "overrides": ["seed=1"], "run": RECIPE}
    plan = {"version": 1, "jobs": [job]}
    text = value if isinstance(value, str) else json.dumps(value)
    if "overrides" in key:
        value = f"{OVERRIDES.get(key, '')}{text}"
    changed = set_at(plan, f"jobs.0.{key}", value)
    (folder / "sweep.json").write_text(json.dumps(changed))
    queue = DeviceQueue(gpus=[], n_jobs=1, threads=None, host="here")
    leases = Leases(folder, owner="me", stale_seconds=9)
    worker = SweepWorker(SweepPlan(folder), leases=leases, queue=queue)
    (made,) = worker.jobs.values()
    assert made.folder.parent == folder and ".." not in made.folder.parts
    return made.command


OVERRIDES = {"overrides.0": "data.source.size="}
RECIPE = {
    "program": "train", "options": [], "cwd": "/", "processes": 1, "nodes": 1, "max_steps": 5,
    "on_cpu": True,
}  # fmt: skip


def of_claim(key: str, finished: Path, value: Any, folder: Path) -> object:
    """A claim's file."""
    from sweeps.claims.read import read_claim

    claim = {
        "sentence": "s", "source": "s", "equal": "steps", "seeds": [0, 1], "minimum": 2,
        "minutes": 1, "shared": ["seed_=1"], "arms": {"a": ["mtp=none"], "b": ["mtp.depth=1"]},
        "measure": {"tag": "val/x"},
        "predictions": [{"arm": "a", "against": "b", "side": "above", "by": 0}],
    }  # fmt: skip
    text = yaml.safe_dump(set_at(claim, key, value))
    (folder / "evil.yaml").write_text(text)
    return read_claim("evil", folder)


def of_meta(key: str, finished: Path, value: Any, folder: Path) -> object:
    """A token store's ``meta.json``."""
    from data_modules.token_store import TokenStore

    split = {"tokens": 4, "bytes": 3, "documents": 1}
    meta = {"dtype": "uint16", "splits": {"train": split}}
    (folder / "train.bin").write_bytes(bytes(8))
    (folder / "meta.json").write_text(json.dumps(set_at(meta, key, value)))
    return TokenStore(folder)["train"].tokens()


def of_card(key: str, finished: Path, value: Any, folder: Path) -> object:
    """The model card of an export, from the run's config and its summary."""
    from mtp_lightning.interop import card
    from mtp_lightning.interop.writing import Contents

    run = opened(finished)
    found = {"run_config": run.run_config, "summary": {"step": 10, "val/loss_depth_0": 1.0}}
    return card.render(
        "name", run.model.config, Contents(modules=1, heads="", parameters=1, shards=1),
        mtp=run.model.config.mtp, model_type="llama", dtype="float32", step=10,
        **set_at(found, key, value),
    )  # fmt: skip


def of_layer(key: str, finished: Path, value: Any, folder: Path) -> object:
    """The config.json of an EAGLE-3 layer in a trunk's folder: the model is opened."""
    shutil.copytree(_written(folder.parent.parent), folder / "model")
    file = folder / "model" / "draft" / "config.json"
    fields = json.loads(file.read_text())
    if not key.startswith("mtp_lightning"):
        del fields["mtp_lightning"]  # as in a layer from elsewhere
    if key.startswith("eagle_config"):
        del fields["eagle_aux_hidden_state_layer_ids"]
    file.write_text(json.dumps(set_at(fields, key, value)))
    return open_model(folder / "model").model.config


@functools.cache
def _written(base: Path) -> Path:
    """A trunk's folder with an EAGLE-3 layer."""
    pytest.importorskip("safetensors")
    model = build(folders.dense(n_layers=4), EagleConfig(depth=2, draft_vocab=9))
    folders.write(base / "with-a-layer", model)
    return base / "with-a-layer"


def of_reference(key: str, finished: Path, value: Any, folder: Path) -> object:
    """A run that another is compared with."""
    from mtp_lightning.matching import run_reference

    (folder / "summary.json").write_text(json.dumps({"parameters": value, "flops": value}))
    return run_reference(folder)


# Where a value is stored -> the function that reads it, and the keys that a stranger may write.
STORED: dict[str, tuple[Callable[[str, Path, Any, Path], object], tuple[str, ...]]] = {
    "config": (of_config, (
        "data", "data._target_", "data.source", "data.source.size", "data.source.documents",
        "data.seq_len", "data.eval_batch_size", "data.eval_bytes", "data.depth",
        "data.num_workers", "data.cache_dir", "data.val_fraction", "seed", "paths.cache_dir")),
    "checkpoint": (of_model, (
        "trunk", "trunk.d_model", "trunk.n_layers", "trunk.rope_theta", "trunk.norm_eps",
        "trunk.init_std", "trunk.rope_scaling", "trunk.attention", "trunk.attention.variant",
        "mtp", "mtp.depth", "mtp.variant", "mtp.branch")),
    "tokenizer": (of_tokenizer, (
        "kind", "path", "eot_token", "tokenizer_json", "beside", "json.model.vocab.a",
        "json.normalizer", "json.truncation", "json.padding", "json.added_tokens.0.id")),
    "sweep": (of_sweep, (
        "folder", "overrides", "overrides.0", "run", "run.cwd", "run.options", "run.program",
        "run.processes", "run.max_steps")),
    "claim": (of_claim, (
        "sentence", "equal", "seeds", "minutes", "shared", "arms", "arms.a", "measure.tag",
        "predictions.0.arm", "predictions.0.by")),
    "meta.json": (of_meta, (
        "dtype", "splits", "splits.train", "splits.train.tokens", "splits.train.documents")),
    "card": (of_card, (
        "run_config.seed", "run_config.mtp_lambda", "run_config.data.seq_len", "summary.step",
        "summary.val/loss_depth_0")),
    "layer": (of_layer, (
        "architectures", "hidden_size", "draft_vocab_size", "rope_theta", "rope_scaling",
        "eagle_aux_hidden_state_layer_ids", "eagle_config",
        "eagle_config.eagle_aux_hidden_state_layer_ids", "mtp_lightning", "mtp_lightning.variant",
        "mtp_lightning.depth", "mtp_lightning.layers", "mtp_lightning.draft_vocab")),
    "summary.json": (of_reference, ("parameters and flops",)),
}  # fmt: skip
PLACES = {
    f"{name}: {key}": partial(read, key) for name, (read, keys) in STORED.items() for key in keys
}


@pytest.mark.parametrize("place", PLACES)
def test_a_stored_value_is_only_data(place: str, finished: Path, tmp_path: Path) -> None:
    for attack, value in ATTACKS.items():
        folder = tmp_path / attack.replace(" ", "-")
        folder.mkdir()
        try:
            result = PLACES[place](finished, value, folder)
        except (ValueError, OSError) as error:
            result = str(error)
            assert isinstance(error, UserError | OSError), (attack, repr(error))
            assert "\n" not in result and len(result) < 1500, (attack, result)
        except Exception as error:
            raise AssertionError(f"{attack} ends in {error!r}") from error
        assert SECRET not in str(result), attack
        assert "<img" not in str(result) or not place.startswith("card"), attack
        assert "](http" not in str(result) or not place.startswith("card"), attack
        assert not (tmp_path / "outside").exists() and not Path("outside").exists(), attack


OVERRIDDEN = [
    "optimizer._target_=torch.hub.load", "+callbacks.x={_target_: os.system, command: ls}",
    "+callbacks.x={a: [{_target_: pathlib.Path.write_text}]}", "hydra.run.dir=outside",
    "hydra.searchpath=[/tmp]", "hydra/job_logging=none", "--config-dir=/tmp", "-cd=/tmp", "-m",
    "logger=wandb", "logger=[default,mlflow]", "data=huggingface", "logger=../../../tmp/evil",
    "data=/tmp/evil", "optimizer._target_=${evil}", "optimizer.lr=${oc.env:MTP_SECRET}",
    "run_dir=outside", "paths.output_dir=outside", "+logger.csv.folder=outside",
    "data.cache_dir=outside", "callbacks.checkpoints.folder=outside", "allow=[evil]",
    "data.source.data_files=https://localhost/x", "~run_dir", "a[b]=1", "mtp.depth=[", "",
]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDDEN)
@pytest.mark.parametrize("place", ["overrides", "run.options"])
def test_a_plan_refuses_overrides_that_are_not_settings(override, place, tmp_path):
    (folder := tmp_path / "sweep").mkdir()
    with pytest.raises(ValueError, match="sweep.json") as error:
        of_sweep(place, tmp_path, [override], folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    ["mtp.depth=2", "mtp=sequential", "experiment=star_graph", "mtp_lambda=[0.3,0.1]",
     "+mtp.rank=2", "init_from=../runs/mine", "data.paths='/data/a b.txt'", "optimizer.lr=1e-3",
     "data.eval_batch_size=${data.batch_size}", "callbacks=[default,early_stopping]",
     "optimizer._target_=mtp_lightning.optim.adamw.AdamWConfig", "~callbacks.progress",
     "lambda_schedule.knots={0:0.1,1:0.3}"],
)  # fmt: skip
def test_a_plan_accepts_overrides_that_are_settings(override: str) -> None:
    from sweeps.trust import require_plain

    require_plain(override, source="sweep.json")


def gguf(*fields: bytes, tensors: int = 0, infos: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields)) + b"".join(fields) + infos


def field(kind: int, value: bytes, name: bytes = b"a") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


GGUF = {
    "an array of 2^61 numbers": gguf(field(9, struct.pack("<IQ", 4, 2**61))),
    "an array of 2^40 texts": gguf(field(9, struct.pack("<IQ", 8, 2**40))),
    "arrays in arrays": gguf(field(9, struct.pack("<IQ", 9, 1) * 50)),
    "a text of 2^63 bytes": gguf(field(8, struct.pack("<Q", 2**63))),
    "a name of 2^63 bytes": gguf(struct.pack("<Q", 2**63)),
    "2^62 fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62),
    "2^60 tensors": gguf(tensors=2**60),
    "a tensor with a name of 2^62 bytes": gguf(tensors=1, infos=struct.pack("<Q", 2**62)),
    "a tensor of 2^60 dimensions": gguf(tensors=1, infos=struct.pack("<QcI", 1, b"a", 2**31)),
    "a tensor of 2^60 numbers": gguf(
        tensors=1, infos=struct.pack("<QcIQQIQ", 1, b"a", 2, 2**30, 2**30, 0, 0)
    ),
    "an unknown kind": gguf(field(99, b"")),
    "nothing": b"GGUF",
    "no content": b"",
}


@pytest.mark.extras
@pytest.mark.parametrize("name", GGUF)
def test_a_forged_gguf_header_is_refused(name: str, tmp_path: Path) -> None:
    (file := tmp_path / "x.gguf").write_bytes(GGUF[name])
    with pytest.raises(ValueError, match="x.gguf is damaged or not a GGUF file"):
        read_header(file)


def test_a_tokenizer_that_multiplies_its_text_is_refused() -> None:
    from data_modules.tokenizers import ByteTokenizer
    from data_modules.tokenizers.library import library_tokenizer

    plain = json.loads(ByteTokenizer().library_json())
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for part, several in (("normalizer", "normalizers"), ("decoder", "decoders")):
        content = {**plain, part: {"type": "Sequence", several: [twice] * 40}}
        with pytest.raises(ValueError, match=f"its {part} makes a text .* times as long"):
            library_tokenizer(json.dumps(content), source="x")
    for digits in ("9" * 100_000, "1e99999", "9" * 30):
        text = json.dumps({**plain, "version": "N"}).replace('"N"', digits)
        with pytest.raises(ValueError, match="x is not a tokenizer.json"):
            library_tokenizer(text, source="x")
