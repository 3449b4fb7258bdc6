"""The doctor on sound folders, and on broken ones as other systems have written them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.apps import doctor as apps_doctor
from mtp_lightning.interop import agreement, doctor, inventory
from mtp_lightning.interop.inventory import has_initial_size, is_fresh, take_inventory
from mtp_lightning.interop.reading import contents
from mtp_lightning.interop.tensor_files import SafeTensor
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.opening import open_model
from tests import deepseek, models
from tests.integration import helpers
from tests.interop import folders

# Trained long enough that a module knows which of its inputs is which.
SETTINGS = {
    "mtp.depth": 2, "trainer.max_steps": 400, "trainer.val_check_interval": 400,
    "optimizer.lr": 0.01, "data.batch_size": 8,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run with the layout's convention, and one that reads the state before the final norm."""
    path = tmp_path_factory.mktemp("doctor")
    helpers.train_here(path / "post", cache, SETTINGS)
    qwen2 = {"mtp.input_norm": "pre", "+model.attention.qkv_bias": "true"}
    helpers.train_here(path / "mimo", cache, {**SETTINGS, **qwen2})
    return path


def write_folder(run: Path, folder: Path, change: Callable[[Tensors], None] | None = None) -> Path:
    """A run as a folder of one file, with a change to its tensors."""
    loaded = open_model(run)
    folders.write(folder, loaded.model, loaded.tokenizer, max_positions=512)
    if change is not None:
        folders.merge(folder, change)
    return folder


def tensor_names(k: int, tensors: Tensors) -> list[str]:
    """Names of a depth's tensors, copies left out; the trunk has one layer."""
    names = [name for name in tensors if name.startswith(f"model.layers.{k}.")]
    return [n for n in names if "embed_tokens" not in n and "shared_head.head" not in n]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["post", "mimo"])
def test_a_folder_of_trained_modules_is_sound(runs: Path, tmp_path: Path, name: str) -> None:
    diagnosis = doctor.examine(write_folder(runs / name, tmp_path / "x"))
    assert diagnosis.sound, diagnosis.verdict
    assert "is sound: its 2 MTP layer(s) are complete and trained" in diagnosis.verdict
    expected = ("post", "embedding_first") if name == "post" else ("pre", "hidden_first")
    assert diagnosis.meant == diagnosis.best == expected
    best = diagnosis.agreement[diagnosis.best]
    assert best > max(max(diagnosis.agreement.values()) - 0.03, diagnosis.constant + 0.05)
    assert diagnosis.acceptance is not None and diagnosis.acceptance > 0.15
    assert [len(m.lost) for m in diagnosis.modules] == [0, 0]
    folders.change_config(tmp_path / "x", mtp_draft_vocab=1)
    only_one = doctor.examine(tmp_path / "x")  # token 0 is the only draft
    assert only_one.acceptance is not None and only_one.acceptance < diagnosis.acceptance / 2


def zeroed(tensors: Tensors) -> None:
    for name in tensor_names(1, tensors):
        tensors[name] = torch.zeros_like(tensors[name])


def fresh(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in tensor_names(1, tensors):
        shape = tensors[name].shape
        drawn = torch.randn(shape, generator=generator) * 0.02
        tensors[name] = torch.ones(shape) if len(shape) < 2 else drawn


def half_missing(tensors: Tensors) -> None:
    for name in tensor_names(2, tensors)[::2]:
        del tensors[name]


def one_missing(tensors: Tensors, *layers: str) -> None:
    for name in [name for name in tensors if name.startswith((*layers, "model.layers.2."))]:
        del tensors[name]


def all_missing(tensors: Tensors) -> None:
    one_missing(tensors, "model.layers.1.")


def swapped(tensors: Tensors) -> None:
    name = "model.layers.1.eh_proj.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)


def copied(tensors: Tensors) -> None:
    for name in tensor_names(1, tensors):
        twin = name.replace("layers.1.", "layers.0.")
        if twin in tensors:
            tensors[name] = tensors[twin].clone()


def misshapen(tensors: Tensors) -> None:
    tensors["model.layers.1.enorm.weight"] = torch.ones(3)


def other_head(tensors: Tensors) -> None:
    tensors["model.layers.1.shared_head.head.weight"] += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zeroed, r"of MTP depth 1 are all zero \(model.layers.1."),
        (fresh, r"of MTP depth 1 look like a random initialization"),
        (half_missing, r"of MTP depth 2 are missing \(model.layers.2.hnorm.weight"),
        (all_missing, r"declares 2 MTP layer\(s\) and holds none of their tensors"),
        (one_missing, r"of MTP depth 2 are missing"),
        (swapped, r"trained on the state after the final norm, state first \(agreement .*its "
                  r"layout gives them the state after the final norm, embedding first"),
        (copied, r"of MTP depth 1 are the trunk's last block"),
        (misshapen, r"1 of 13 tensors of MTP depth 1 have another shape"),
        (other_head, r"of MTP depth 1 differ from the trunk's"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_broken_modules_are_not_sound(
    runs: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    diagnosis = doctor.examine(write_folder(runs / "post", tmp_path / "x", change))
    assert not diagnosis.sound
    assert re.search(message, diagnosis.verdict), diagnosis.verdict


@pytest.mark.parametrize("draft_vocab", [None, 7])
def test_the_agreement_of_a_convention_is_that_of_its_model(draft_vocab: int | None) -> None:
    """Against whole models, one a convention, with norm gains that tell the two states apart."""
    trunk = folders.dense(tie_embeddings=False)
    model = deepseek.build(trunk, depth=1).eval()
    texts = [torch.randint(folders.ROWS, (40,), generator=torch.Generator().manual_seed(3))]
    rights = agreement.agreement_of_conventions(model, texts, draft_vocab).rights
    for (norm, order), expected in rights.items():
        twin = deepseek.build(trunk, depth=1, input_norm=norm, concat=order).eval()
        twin.load_state_dict(model.state_dict())
        padded = torch.cat((texts[0], texts[0][:1])).unsqueeze(0)  # T = 39 positions
        with torch.no_grad():
            hidden = twin(WindowBatch(padded, 1))
        drafted = twin.head(hidden[1])[0][:, :draft_vocab].argmax(-1)
        chosen = twin.head(twin(WindowBatch(torch.cat((padded, padded[:, :1]), 1), 1))[0])
        right = drafted == chosen[0].argmax(-1)[1:]
        assert torch.equal(expected, right)


def test_one_convention_must_clearly_beat_another(tmp_path: Path) -> None:
    """A module that was trained on the state before the norm, under a layout that gives the other:
    the share of positions that other systems were measured at, 0.58 against 1.00."""
    meant, other = ("post", "embedding_first"), ("pre", "embedding_first")
    right = torch.arange(200) % 100 < 58
    rights = {meant: right, other: torch.ones(200, dtype=torch.bool)}
    assert agreement.clearly_best(rights, meant) == other
    assert agreement.clearly_best({meant: right, other: right.roll(1)}, meant) == meant
    diagnosis = doctor.Diagnosis(
        folder=tmp_path, layout="x", verdict="", sound=True, meant=meant, best=other,
        agreement={meant: 0.58, other: 1.0}, constant=0.1,
    )  # fmt: skip
    sound, reason = doctor._judge_drafts(diagnosis, 1)
    assert not sound and reason == (
        "its weights were trained on the state before the final norm, embedding first (agreement "
        "100.0%), but its layout gives them the state after the final norm, embedding first "
        "(58.0%)"
    )
    diagnosis = replace(diagnosis, best=meant, agreement={meant: 0.58}, constant=0.7)
    assert doctor._judge_drafts(diagnosis, 1)[1].endswith(
        "agree with the trunk more often than one token everywhere does (58.0%, and 70.0% with one "
        "token)"
    )


@pytest.mark.slow
def test_the_command_exits_with_2_if_a_folder_is_not_sound(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = helpers.execute([sys.executable, str(helpers.ROOT / "doctor.py"),
                            str(write_folder(runs / "post", tmp_path / "x"))])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "<- the layout's" in done.stdout and "is sound" in done.stdout.splitlines()[-1]
    for folder, code in (
        (write_folder(runs / "post", tmp_path / "zero", zeroed), 2),
        (tmp_path / "nowhere", 1),
    ):
        with pytest.raises(SystemExit) as stop:
            apps_doctor.main([str(folder)])
        assert stop.value.code == code
    assert "not sound" in capsys.readouterr().out


def test_a_verdict_names_the_measure_that_failed_or_the_next_command(tmp_path: Path) -> None:
    trunk = folders.dense(tie_embeddings=False)
    folders.write(tmp_path / "heads", models.build(trunk, ParallelConfig(depth=1)))
    heads = doctor.examine(tmp_path / "heads")
    share = f"{heads.constant:.1%}"
    assert heads.verdict.endswith(f"drafts, and {share} of its tokens are one and the same.")
    assert re.search(f"{share} +the same token everywhere", "\n".join(heads.lines()))
    folders.write(tmp_path / "plain", models.build(trunk, SequentialConfig(depth=0)))
    folder = tmp_path / "plain"
    assert doctor.examine(folder).verdict.endswith(f"mtp-lightning heads {folder} trains a head.")


def test_the_inventory_reads_a_modules_tensors_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deepseek.build(folders.dense(tie_embeddings=False), depth=1)
    folders.write(tmp_path, model)
    _, parts = contents(tmp_path)
    names_read: list[str] = []
    read = SafeTensor.read
    monkeypatch.setattr(SafeTensor, "read", lambda part: names_read.append(part.name) or read(part))
    take_inventory(model.config, parts)
    layer = f"model.layers.{model.config.trunk.n_layers}."
    assert sorted(n for n in names_read if n.startswith(layer)) == sorted(
        name for name in parts if name.startswith(layer)
    )


@pytest.mark.parametrize(("fewest", "lost"), [(2**15, set()), (2**12, {"fresh"})])
def test_a_small_matrix_among_trained_ones_may_look_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewest: int, lost: set[str]
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(inventory, "_FEWEST_ALONE", fewest)
    model = deepseek.build(folders.dense(d_model=64, tie_embeddings=False), depth=1)
    matrices = {n: p.data for n, p in model.mtp.depths[0].named_parameters() if p.dim() > 1}
    for name, matrix in matrices.items():
        rows = 1 if name.endswith("out.weight") else torch.linspace(0.5, 1.5, len(matrix))
        matrix.normal_(std=0.02).T.mul_(rows)
    folders.write(tmp_path, model)
    (module,) = take_inventory(model.config, contents(tmp_path)[1])
    assert module.lost.keys() == lost


@pytest.mark.parametrize("shape", [(64, 128), (576, 1152)])
def test_a_matrix_that_grew_is_not_of_initial_size(shape: tuple[int, int]) -> None:
    trunk = TrunkConfig(
        vocab_size=50, d_model=64, n_layers=8, n_heads=4, n_kv_heads=2, d_ff=96, init_std=0.05
    )
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(shape, generator=generator).double()
        for std in (0.05, 0.05 / 4, 0.02):
            assert has_initial_size((normal * std).bfloat16().double(), trunk)
            assert not has_initial_size(normal * std * 1.2, trunk)
    assert has_initial_size(torch.nn.Linear(*reversed(shape)).weight.detach().double(), trunk)


@pytest.mark.parametrize("shape", [(32, 64), (32, 100), (576, 1152)])
def test_is_fresh_is_true_for_random_matrices_only(shape: tuple[int, int]) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(shape, generator=generator).double()
        uniform = torch.rand(shape, generator=generator).double() - 0.5
        assert is_fresh(normal * 0.02) and is_fresh(uniform)
        rows = torch.linspace(0.5, 1.5, shape[0]).unsqueeze(1)
        assert not is_fresh(normal * rows), "rows of unequal length"
        assert not is_fresh(normal * (1 + 0.5 * normal**2)), "heavy tails"
