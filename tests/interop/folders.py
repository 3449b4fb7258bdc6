"""Writes small models as folders, and reads and compares folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data_modules.tokenizers import ByteTokenizer
from data_modules.windows import WindowBatch
from mtp_lightning.interop import tensor_files
from mtp_lightning.interop.exporting import export
from mtp_lightning.interop.reading import describe
from mtp_lightning.interop.tensor_files import CONFIG, INDEX, SINGLE
from mtp_lightning.interop.writing import Contents, write_folder
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.nn.rope import Llama3Scaling, YarnScaling
from mtp_lightning.weights import Stored, StoredModel
from tests import deepseek, models
from tests.integration.helpers import CONF

# More rows than the byte tokenizer needs, as padded vocabularies have.
ROWS = 264
DENSE = TrunkConfig(
    vocab_size=ROWS, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, rope_theta=5e5
)


def dense(**changes: Any) -> TrunkConfig:
    """:data:`DENSE` with changes."""
    return replace(DENSE, **{"d_head": None, **changes})


STRETCHED = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=32
)
TRUNKS = {
    "llama": dense(tie_embeddings=False),
    "llama-tied": dense(),
    "llama-wide-heads": dense(d_head=16),
    "llama3": dense(rope_scaling=STRETCHED),
    "yarn": dense(rope_scaling=YarnScaling(factor=4.0, original_positions=32)),
    "deepseek-yarn": deepseek.trunk(
        vocab_size=ROWS,
        rope_scaling=YarnScaling(factor=8.0, original_positions=32, mscale=1.0, mscale_all_dim=0.7),
    ),
    "qwen2": dense(attention=GroupedQueryConfig(qkv_bias=True)),
    "qwen3": dense(attention=GroupedQueryConfig(qk_norm=True), d_head=16),
    "qwen3_moe": dense(
        attention=GroupedQueryConfig(qk_norm=True), d_head=16, tie_embeddings=False,
        feed_forward=ExpertsConfig(n_routed=8, n_shared=0, top_k=2, d_expert=16,
                                   scoring="softmax", bias_rate=0.0),
    ),
    "glm4_moe": dense(
        attention=GroupedQueryConfig(qk_norm=True, qkv_bias=True, d_rope=8), d_head=16,
        tie_embeddings=False,
        feed_forward=ExpertsConfig(n_routed=8, n_shared=1, top_k=2, d_expert=16, first_k_dense=1,
                                   scaling=2.5, n_groups=4, top_groups=2),
    ),
    "glm4_moe-whole-heads": dense(
        feed_forward=ExpertsConfig(n_routed=8, n_shared=2, top_k=2, d_expert=16),
    ),
    "deepseek": deepseek.trunk(vocab_size=ROWS, tie_embeddings=False, norm_eps=1e-5,
                                latent={"norm_eps": 1e-6}),
    "deepseek-tied": deepseek.trunk(vocab_size=ROWS, latent={"q_rank": None}),
    "deepseek-shared": deepseek.trunk(vocab_size=ROWS, experts={"n_shared": 2, "n_groups": 1,
                                                                "top_groups": 1}),
    "deepseek-no-mixture-in-trunk": deepseek.trunk(vocab_size=ROWS, experts={"first_k_dense": 3}),
}  # fmt: skip


def write(folder: Path, model: MTPModel, tokenizer: Any = None, **changes: Any) -> Contents:
    """A folder of a model, in small shards; without a tokenizer, it gets that of bytes."""
    options = {"dtype": "float32", "max_positions": 64, "shard_bytes": 20_000, **changes}
    return write_folder(folder, model, tokenizer or ByteTokenizer(), **options)


@dataclass(frozen=True)
class Folder:
    """The model of a folder or a GGUF file."""

    stored: StoredModel

    @property
    def config(self) -> ModelConfig:
        return self.stored.config

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        stored = self.stored.weights.items()
        return {name: w.tensor() if isinstance(w, Stored) else w for name, w in stored}

    def build(self) -> MTPModel:
        return self.stored.build()


def read_folder(path: str | Path) -> Folder:
    return Folder(describe(Path(path)))


def random_model(trunk: TrunkConfig, mtp: MTPConfig) -> MTPModel:
    """A random model; a head over a part of the vocabulary has chosen its tokens."""
    model = models.build(trunk, mtp).eval()
    if model.mtp.own_head is not None:
        generator = torch.Generator().manual_seed(1)
        model.mtp.own_head.choose(torch.randint(0, 99, (trunk.vocab_size,), generator=generator))
    return model


def export_run(checkpoint: Path, output: Path, **changes: Any) -> Path:
    """What ``export.py`` does, in this process."""
    settings = {"checkpoint": str(checkpoint), "output": str(output), **changes}
    return export(OmegaConf.merge(OmegaConf.load(CONF / "export.yaml"), settings))


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of a folder's config.json; None leaves a field out."""
    fields = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def change_json(file: Path, **changes: Any) -> None:
    """Set fields of a file; None is null."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def index_of(folder: Path) -> dict[str, str]:
    """The file of every tensor in a folder of shards."""
    return json.loads((folder / INDEX).read_text())["weight_map"]  # type: ignore[no-any-return]


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return {name: part.read() for name, part in tensor_files.open_file(file)[0].items()}


def merge(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """All shards into one file without an index, with a change to the tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors |= tensors_of(file)
        file.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    tensor_files.write(folder / SINGLE, tensors, {"format": "pt"})


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config.json and the tensors of a folder of one file."""
    return json.loads((folder / CONFIG).read_text()), tensors_of(folder / SINGLE)


def files(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@torch.no_grad()
def logits(model: MTPModel, seed: int = 0) -> list[torch.Tensor]:
    """Of every depth, for random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(ROWS, (2, 24 + model.depth + 1), generator=generator)
    return [model.head_of(k)(h) for k, h in model(WindowBatch(tokens, model.depth)).items()]


def assert_equal_logits(model: MTPModel, theirs: Any, *, rows: int) -> None:
    """The main prediction of random tokens is that of a model of transformers."""
    tokens = torch.randint(rows, (2, 40))
    with torch.no_grad():
        expected = theirs(tokens).logits
        batch = WindowBatch(torch.cat((tokens, tokens[:, :1]), dim=1), 0)
        logits = model.head(model(batch)[0])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
