"""``export.py``: from a run to a folder that is checked, or an error."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.command_line.shell import readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.generating import decoding_options
from mtp_lightning.interop import card, exporting, writing
from mtp_lightning.interop.verify import CheckFailed, check_trained
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.teacherless import TeacherlessConfig
from mtp_lightning.opening import open_model
from tests import deepseek, models
from tests.integration import helpers
from tests.interop import folders
from tests.interop.folders import read_folder

# transformers imports optional packages that warn.
pytestmark = pytest.mark.filterwarnings("ignore")

DEEPSEEK = {
    "model": "deepseek_nano", "model.n_kv_heads": None, "model.n_heads": 2, "model.n_layers": 2,
    "model.attention.kv_rank": 10, "model.attention.d_nope": 8,
    "model.attention.d_rope": 4, "model.attention.d_value": 6,
    "model.feed_forward.n_routed": 4, "model.feed_forward.d_expert": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A dense run, a DeepSeek run, and their cache."""
    path = tmp_path_factory.mktemp("export")
    (path / "cache").symlink_to(cache)
    settings = {"trainer.max_steps": 6, "trainer.val_check_interval": 3}
    helpers.train_here(path / "dense", path / "cache", {**settings, "mtp.depth": 1})
    helpers.train_here(path / "deepseek", path / "cache", {**settings, **DEEPSEEK})
    return path


@pytest.mark.extras
@pytest.mark.parametrize(("name", "depth"), [("dense", 1), ("deepseek", 2)])
def test_a_run_is_exported_and_verified(
    base: Path, name: str, depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="the check needs it: pip install -e '.[hf]'")
    folders.export_run(base / name, tmp_path / "out", shard_gb=2e-5)
    output = capsys.readouterr().out
    for line in ("trained tensors differ from their initialization", "tensors are the model's",
                 "logits of the trunk equal", f"logits of the MTP depth {depth} equal",
                 "use_mtp=True", "ids for a text"):  # fmt: skip
        assert line in output
    assert "verified\ntext: " in output
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "README.md", "model.safetensors.index.json"} < files  # fmt: skip
    assert len([name for name in files if name.startswith("model-")]) > 1
    expected = open_model(base / name).model.state_dict()
    weights = read_folder(tmp_path / "out").weights
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())

    folders.export_run(tmp_path / "out", tmp_path / "again", shard_gb=2e-5)
    assert folders.files(tmp_path / "out") == folders.files(tmp_path / "again")


def test_a_folder_names_the_tokens_that_its_heads_draft(base: Path, tmp_path: Path) -> None:
    helpers.train_here(
        tmp_path / "short",
        base / "cache",
        {"trainer.max_steps": 1, "trainer.val_check_interval": 1, "objective.draft_vocab": 20,
         "init_from": str(base / "dense"), "mtp.depth": 1, "mtp.freeze_trunk": True},
    )  # fmt: skip
    folder = tmp_path / "out"
    folders.export_run(tmp_path / "short", folder, verify=False)
    cfg = helpers.composed("generate", [f"checkpoint={folder}", "draft_depth=1"])
    assert decoding_options(cfg, open_model(folder)).draft_vocab == 20
    folders.export_run(folder, tmp_path / "again", verify=False)
    assert open_model(tmp_path / "again").run_config["objective"] == {"draft_vocab": 20}
    folders.export_run(folder, tmp_path / "plain", verify=False, depth=0)
    plain = open_model(tmp_path / "plain")
    assert plain.model.depth == 0 and "objective" not in plain.run_config
    for wrong in ("many", 0, 1 << 20):
        folders.change_config(folder, mtp_draft_vocab=wrong)
        with pytest.raises(UserError, match="mtp_draft_vocab of .*/out must be a whole number"):
            open_model(folder)


def test_the_card_describes_the_folder(base: Path, tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file

    folders.export_run(base / "deepseek", tmp_path / "out", verify=False)
    text = (tmp_path / "out" / card.FILE).read_text()
    output = capsys.readouterr().out
    assert "NOT VERIFIED" in output
    for part in ("llama.cpp's converter silently ignores DeepSeek-V3's MTP layers",
                 "SGLang reads one MTP layer and refuses a folder of 2"):  # fmt: skip
        assert part in text and part in output
    folders.export_run(base / "dense", tmp_path / "llama", verify=False)
    assert "but not of llama" in capsys.readouterr().out
    assert "but not of llama" in (tmp_path / "llama" / card.FILE).read_text()
    for part in ("`model.layers.2` to `model.layers.3`", "after 6 optimizer steps", "depth 2",
                 "| depth | loss", "| 2 |", "vLLM",
                 r'_keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\.", '):  # fmt: skip
        assert part in text, part
    config = open_model(base / "deepseek").model.config
    trunk, whole = config.num_trunk_params(), config.num_params()
    # The embedding and the head of each of two depths; biases of four experts, three times.
    beyond = 2 * 2 * config.trunk.vocab_size * config.trunk.d_model + 3 * 4
    counts = f"{whole + beyond:,} values are stored: {trunk:,} of the trunk and its head, "
    counts += f"{whole - trunk:,} of the MTP modules, {beyond:,} that repeat others"
    assert counts in text
    files = (tmp_path / "out").glob("*.safetensors")
    assert sum(t.numel() for file in files for t in load_file(file).values()) == whole + beyond
    summary = {"step": 6, "val/loss_depth_0": 1.5, "decode/acceptance_position_1": 0.75}
    config = deepseek.build(folders.DENSE, depth=1).config
    text = card.render(
        "x",
        config,
        writing.Contents(modules=1, heads="", parameters=9, shards=1),
        mtp=config.mtp,
        model_type="llama",
        dtype="float32",
        step=6,
        run_config={},
        summary=summary,
    )
    assert "| 1 |  |  |  | 75.0% |" in text and "depth=0" in text and "Drafts accepted:" in text


def test_the_card_of_a_part_describes_the_training_of_the_whole(base: Path, tmp_path: Path) -> None:
    folders.export_run(base / "dense", tmp_path / "trunk", verify=False, depth=0)
    text = (tmp_path / "trunk" / card.FILE).read_text()
    assert "has no MTP modules" in text and "mtp: sequential, depth 1" in text and "| 1 |" in text
    assert "started from" not in text
    helpers.train_here(
        tmp_path / "heads",
        base / "cache",
        {"trainer.max_steps": 1, "trainer.val_check_interval": 1, "mtp.freeze_trunk": True,
         "init_from": str(tmp_path / "trunk"), "mtp.depth": 1},
    )  # fmt: skip
    folders.export_run(tmp_path / "heads", tmp_path / "out", verify=False)
    text = (tmp_path / "out" / card.FILE).read_text()
    assert "from the weights of trunk, and only its MTP modules were" in text


@pytest.mark.extras
def test_an_untrained_module_is_named_and_nothing_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other systems export MTP weights as they were initialized, with exit code 0."""
    pytest.importorskip("transformers", reason="the check needs it: pip install -e '.[hf]'")
    checkpoint = helpers.checkpoint(base / "dense", "best.ckpt")
    fresh = open_model(base / "dense").model
    fresh.initialize(0)
    name = "mtp.depths.0.eh_proj.weight"
    checkpoint["state_dict"][f"model.{name}"] = fresh.state_dict()[name]
    torch.save(checkpoint, tmp_path / "lost.ckpt")
    with pytest.raises(SystemExit) as stop, readable_errors():
        folders.export_run(tmp_path / "lost.ckpt", tmp_path / "out")
    assert stop.value.code == 1
    assert f"error: {name} is exactly as seed 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["lost.ckpt"]


def test_nothing_is_said_of_training_where_nothing_was_trained(base: Path) -> None:
    run = open_model(base / "dense")
    (line,) = exporting._check_seed(run, run.model)
    assert "trained tensors differ" in line
    assert not list(exporting._check_seed(run, run.model.requires_grad_(False)))


def test_untrained_parameters_may_equal_their_initialization() -> None:
    model = deepseek.build(folders.DENSE, depth=2)
    fresh = deepseek.build(folders.DENSE, depth=2, freeze_trunk=True)
    fresh.initialize(5)
    with pytest.raises(CheckFailed, match=r"mtp.depths.0.enorm.weight"):
        check_trained(fresh, 5, [0.1, 0.1])
    fresh.mtp.load_state_dict(model.mtp.state_dict())
    assert check_trained(fresh, 5, [0.1, 0.1]).startswith("20 ")  # the frozen trunk is left out
    fresh.mtp.depths[1].norm.weight.data.fill_(1.0)
    assert check_trained(fresh, 5, [0.1, 0.0]).startswith("10 ")
    with pytest.raises(CheckFailed, match=r"mtp.depths.1.norm.weight"):
        check_trained(fresh, 5, [0.0, 0.1])


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("write_folder", OSError(errno.ENOSPC, "No space left")),
        ("card.render", KeyboardInterrupt()),
        ("check_bytes", KeyboardInterrupt()),
        ("Path.replace", OSError(errno.ENOSPC, "No space left")),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    monkeypatch.setattr(exporting, "import_transformers", lambda: None)
    for check in ("check_tokenizer", "check_with_transformers"):
        monkeypatch.setattr(exporting, check, lambda *_: [])

    def fail(*_: Any, **__: Any) -> None:
        assert step == "write_folder" or (tmp_path / ".out.partial/out/config.json").is_file()
        raise error

    if step == "write_folder":  # after its first file
        monkeypatch.setattr(writing, "_write_shards", fail)
    else:
        monkeypatch.setattr(f"mtp_lightning.interop.exporting.{step}", fail)
    with pytest.raises(type(error)):
        folders.export_run(base / "dense", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_one_process_exports_to_an_output_at_a_time(
    base: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exports that shared a folder for their unfinished files left a mixture of both."""
    if name == "out.gguf":
        pytest.importorskip("gguf", reason="GGUF files need pip install -e '.[hf]'")
    output, step = tmp_path / name, "_fill_file" if name == "out.gguf" else "_fill"
    fill = getattr(exporting, step)

    def with_another(*args: Any) -> None:
        with pytest.raises(
            BlockingIOError, match=rf"works in .*\.{name}.partial: .* another output"
        ):
            folders.export_run(base / "deepseek", output, verify=False)
        fill(*args)
        assert not output.exists()

    monkeypatch.setattr(exporting, step, with_another)
    remains = tmp_path / f".{name}.partial" / name  # of a killed export
    remains.parent.mkdir()
    if name == "out":
        remains.mkdir()
        (remains / "model-00002-of-00002.safetensors").touch()
    else:
        remains.write_text("GG")
    folders.export_run(base / "dense", output, verify=False)
    card_of = [] if name == "out" else ["out.md"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [name, *card_of]
    expected = open_model(base / "dense").model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in read_folder(output).weights.items())
    if name == "out":
        assert not (output / "model-00002-of-00002.safetensors").exists()


def test_an_output_that_appears_during_an_export_is_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_slowly(*args: Any, **options: Any) -> Any:
        (tmp_path / "out.gguf").write_text("theirs")
        (tmp_path / "out.md").write_text("theirs")
        return open_model(*args, **options)

    monkeypatch.setattr(exporting, "open_model", open_slowly)
    with pytest.raises(FileExistsError, match="out.gguf exists: choose another output="):
        folders.export_run(base / "dense", tmp_path / "out.gguf")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "out.gguf": "theirs", "out.md": "theirs",
    }  # fmt: skip


def test_confidence_estimates_are_left_out_and_reported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"objective.confidence": "true", "trainer.max_steps": 2}
    helpers.train_here(tmp_path / "run", base / "cache", settings)
    folders.export_run(tmp_path / "run", tmp_path / "out", verify=False)
    assert "(objective.confidence) are left out" in capsys.readouterr().out


@pytest.mark.extras
def test_heads_without_a_layout_are_exported_and_reported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"mtp": "parallel", "trainer.max_steps": 3, "trainer.val_check_interval": 3}
    helpers.train_here(tmp_path / "run", base / "cache", settings)
    pytest.importorskip("transformers", reason="the check needs it: pip install -e '.[hf]'")
    folders.export_run(tmp_path / "run", tmp_path / "out")
    output = capsys.readouterr().out
    assert "mtp=parallel" in output and "mtp_heads.safetensors, read back" in output
    assert "mtp_heads.safetensors" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype=int8 is unknown"),
        ({"depth": 1}, "depth=1"),
    ],
)
def test_options_out_of_range_are_refused(
    base: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        folders.export_run(base / "dense", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("output", "depth"), [("out", None), ("out", 0), ("out.gguf", None)])
@pytest.mark.parametrize(
    ("mtp", "why"),
    [(LinearConfig(depth=1, rank=2), "mtp.rank=2"), (TeacherlessConfig(), "answers at once")],
)
def test_models_that_no_program_decodes_are_refused(
    base: Path, output: str, depth: int | None, mtp: MTPConfig, why: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = open_model(base / "dense")
    other = replace(run, model=models.build(run.model.config.trunk, mtp).eval())
    monkeypatch.setattr(exporting, "open_model", lambda path, allow: other)
    with pytest.raises(UserError, match=f"{why}.*: it cannot be exported"):
        folders.export_run(base / "dense", tmp_path / output, depth=depth, verify=False)
    assert list(tmp_path.iterdir()) == []


def test_a_mounted_output_folder_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(UserError, match="is a mounted folder: give a new folder inside it"):
        folders.export_run(base / "deepseek", tmp_path)


@pytest.mark.parametrize("name", ["na\udcffme/out", "o\udcff.gguf"])
def test_an_output_that_is_not_utf8_is_refused(base: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not UTF-8, as libraries need it: choose another name"):
        folders.export_run(base / "dense", tmp_path / name, verify=False)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_not_empty_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="is not empty"):
        folders.export_run(base / "dense", tmp_path, verify=False)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
