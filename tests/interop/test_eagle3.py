"""The folder of EAGLE-3's layer: its tensors, and drafts by the published forward pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.session import Session
from mtp_lightning.errors import UserError
from mtp_lightning.interop import eagle3, stack_file, tensor_files
from mtp_lightning.interop.tensor_files import SINGLE
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.opening import open_model
from tests.interop import folders
from tests.interop.folders import read_folder
from tests.interop.test_round_trip import round_trip

VOCAB, DEPTH = folders.ROWS, 3


def build(**switches: Any) -> MTPModel:
    trunk = folders.dense(n_layers=4, init_std=0.3)
    mtp = EagleConfig(**{"depth": DEPTH, "draft_vocab": 50, **switches})
    return folders.random_model(trunk, mtp)


class Published:
    """SafeAILab/EAGLE's forward pass (``cnets.py``: ``topK_genrate`` of one candidate), written
    from its equations in plain torch, on the files of a folder alone."""

    def __init__(self, folder: Path) -> None:
        self.c, self.w = folders.read(folder)

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x * x).mean(-1, keepdim=True) + self.c["rms_norm_eps"]
        return x / scale.sqrt() * self.w[f"{name}.weight"]

    def rotate(self, x: Tensor, places: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = places.float() * self.c["rope_theta"] ** (-torch.arange(half).float() / half)
        a, b = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def layer(self, embedded: Tensor, hidden: Tensor, at: int, cache: list[Any]) -> Tensor:
        """One position, [C] each; its key and value join the cache."""
        p, n, m = "midlayer", self.c["num_attention_heads"], self.c["num_key_value_heads"]
        size = self.c["head_dim"]
        x = torch.cat(
            (self.norm(embedded, f"{p}.input_layernorm"), self.norm(hidden, f"{p}.hidden_norm"))
        )
        q, k, v = (self.w[f"{p}.self_attn.{name}_proj.weight"] @ x for name in "qkv")
        place = torch.tensor(at)
        q = self.rotate(q.view(n, size), place)
        cache.append((self.rotate(k.view(m, size), place), v.view(m, size)))
        keys, values = (
            torch.stack(x).repeat_interleave(n // m, 1) for x in zip(*cache, strict=True)
        )
        shares = (torch.einsum("nh,tnh->nt", q, keys) / math.sqrt(size)).softmax(-1)
        mixed = torch.einsum("nt,tnh->nh", shares, values).flatten()
        hidden = hidden + self.w[f"{p}.self_attn.o_proj.weight"] @ mixed
        x = self.norm(hidden, f"{p}.post_attention_layernorm")
        gate, up = (self.w[f"{p}.mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
        return hidden + self.w[f"{p}.mlp.down_proj.weight"] @ (F.silu(gate) * up)

    def drafts(self, states: Tensor, embedding: Tensor, tokens: list[int], n: int) -> list[Tensor]:
        """Logits [N] of ``n`` drafts after ``tokens``, greedily; ``states`` [T - 1, 3 C] are the
        trunk's at all of them but the last."""
        cache: list[Any] = []
        for at, state in enumerate(states):
            fused = self.w["fc.weight"] @ state
            hidden = self.layer(embedding[tokens[at + 1]], fused, at, cache)
        logits = []
        for step in range(n):
            logits.append(self.w["lm_head.weight"] @ self.norm(hidden, "norm"))
            row = int(logits[-1].argmax())
            token = row + int(self.w["d2t"][row])
            hidden = self.layer(embedding[token], hidden, len(states) + step, cache)
        return logits


@pytest.mark.parametrize("draft_vocab", [50, None])
@torch.no_grad()
def test_drafts_are_those_of_the_published_forward_pass(
    draft_vocab: int | None, tmp_path: Path
) -> None:
    model = build(draft_vocab=draft_vocab)
    contents, back = round_trip(model, tmp_path)
    assert back.config == model.config and contents.heads and contents.modules == 0
    folder = tmp_path / "one"
    assert stack_file.is_there(folder) and not (folder / stack_file.FILE).exists()
    published = Published(folder / eagle3.FOLDER)
    assert published.c["architectures"] == ["LlamaForCausalLMEagle3"]
    assert published.c["draft_vocab_size"] == (draft_vocab or VOCAB)
    layers = published.c["eagle_aux_hidden_state_layer_ids"]
    assert layers == [1, 2, 3]
    assert published.c["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    tokens = [7, 200, 31, 31, 8, 99]
    embedding = model.trunk.embedding.weight
    head = model.mtp.own_head
    assert head is not None
    assert torch.equal(published.w["t2d"], torch.isin(torch.arange(VOCAB), head.tokens))
    assert published.w["d2t"].dtype == torch.int64
    with decoding_passes(model):
        session = Session(model, slots=1, capacity=24, max_draft=5)
        session.join([tokens[:-1]])
        session.put_pending(torch.tensor(tokens[-1:]))
        states = session.states[0][0, : len(tokens) - 1]
        for k, expected in enumerate(published.drafts(states, embedding, tokens, 5), start=1):
            logits = session.draft(k).logits_BV[0]
            torch.testing.assert_close(logits[head.tokens], expected, rtol=1e-4, atol=1e-4)
            session.put(logits.argmax().view(1, 1), k)


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes a config.json and removes this project's fields."""
    folders.change_config(folder / eagle3.FOLDER, mtp_lightning=None, **changes)


def test_released_folders_without_our_fields_are_read(tmp_path: Path) -> None:
    """For SGLang, for vLLM, or with the default layers; a null stands for the default."""
    model = build()
    for name, changes in {
        "vllm": {"eagle_config": None},
        "sglang": {"eagle_aux_hidden_state_layer_ids": None},
        "release": {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": None},
        "transformers5": {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}},
    }.items():
        folders.write(tmp_path / name, model)
        rewrite(tmp_path / name, **changes)
        folders.change_json(tmp_path / name / eagle3.FOLDER / "config.json", head_dim=None)
        back = read_folder(tmp_path / name)
        assert isinstance(back.config.mtp, EagleConfig)
        assert back.config.mtp.draft_vocab == 50 and back.config.mtp.depth == 7
        assert back.config.mtp.layers_of(4) == (1, 2, 3)
        assert torch.equal(
            back.weights["mtp.depths.0.head.tokens"].long(), model.mtp.layer.head.tokens
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is not the folder of a LlamaForCausalLMEagle3"),
        ({"hidden_size": 64}, "has hidden_size=64, and a layer on this trunk has 32"),
        ({"rope_theta": None}, "has rope_theta=10000.0"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "has rope_theta=1000000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has rope_scaling of type linear"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor=0.5"),
        ({"num_hidden_layers": 2}, "has num_hidden_layers=2"),
        ({"norm_before_residual": True}, "has norm_before_residual=True"),
        ({"norm_output": True}, "has norm_output=True"),
        ({"eagle_config": {"norm_output": True}}, "has norm_output=True"),
        ({"eagle_config": {"mlp_bias": True}}, "has mlp_bias=True"),
        ({"draft_vocab_size": 51}, "d2t in .* is not a table of 51"),
        ({"draft_vocab_size": 10**12}, "draft_vocab=1000000000000, but the model has 264"),
        ({"draft_vocab_size": "many"}, "mtp.draft_vocab must be a whole number"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "must be three whole numbers"),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "names no layers"),
    ],
)
def test_a_config_that_does_not_fit_the_trunk_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folders.write(tmp_path / "out", build())
    rewrite(tmp_path / "out", **changes)
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path / "out")


@pytest.mark.parametrize("d2t", [[0] * 49 + [500], [1] + [0] * 49, [-5] + [0] * 49])
def test_a_forged_draft_vocabulary_is_refused(d2t: list[int], tmp_path: Path) -> None:
    folders.write(tmp_path / "out", build())
    _, tensors = folders.read(tmp_path / "out" / eagle3.FOLDER)
    forged = {**tensors, "d2t": torch.tensor(d2t)}
    tensor_files.write(tmp_path / "out" / eagle3.FOLDER / SINGLE, forged, {})
    with pytest.raises(UserError, match="draft vocabulary does not give every row of the head one"):
        open_model(tmp_path / "out")
