"""A real Trainer, interrupted and resumed, sees the batches of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_modules import TokenDataModule
from data_modules.sources import SyntheticSource
from data_modules.tokenizers import ByteTokenizer

STEPS = 17


class Recorder(LightningModule):
    """Trains one number and writes down every batch; optimises by hand like the real module."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tokens.tolist())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight - batch.tokens.double().mean()) ** 2)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.validated.append(len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveEveryStep(Callback):
    """A checkpoint after each step, before validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class SaveAfterValidation(SaveEveryStep):
    def on_train_batch_end(self, trainer, *_):
        pass

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def data(folder: Path, workers: int) -> TokenDataModule:
    # 5 steps an epoch: 17 steps are three epochs and a part.
    source = SyntheticSource(size=3_000, documents=30, seed=1)
    return TokenDataModule(
        source,
        ByteTokenizer(),
        seq_len=32,
        batch_size=8,
        depth=2,
        accumulate=2,
        val_fraction=0.1,
        cache_dir=folder,
        num_workers=workers,
        seed=11,
    )


def fit(folder: Path, workers: int, *, steps: int = STEPS, resume: Path | None = None, save=None):
    module = Recorder()
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[save] if save else [],
        default_root_dir=folder,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data(folder, workers), ckpt_path=resume, weights_only=True)
    return module


pytestmark = [
    # Lightning 2.6 with torch 2.13.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # On a machine of one core.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("save", [SaveEveryStep, SaveAfterValidation])
def test_resumed_from_every_step_sees_the_same_batches(tmp_path, save, workers):
    whole = fit(tmp_path, workers, save=save(tmp_path))
    loader = data(tmp_path, 0).train_dataloader()
    assert len(loader) == 5, len(loader)
    assert len(whole.seen) == STEPS and all(len(batch) == 16 for batch in whole.seen)
    assert whole.seen == [b.tokens.tolist() for _ in range(4) for b in loader][:STEPS]
    # Mid-epoch, one before the end, an epoch's last step, its first.
    for step in (3, 6, 9, 12, 15) if save is SaveAfterValidation else (2, 4, 5, 6, 10, 15):
        resumed = fit(tmp_path, workers, resume=tmp_path / f"{step}.ckpt")
        assert len(resumed.seen) == STEPS - step
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(resumed.weight, whole.weight)


def test_a_resumed_run_can_be_resumed_again(tmp_path):
    whole = fit(tmp_path, 0)
    fit(tmp_path, 0, steps=4, save=SaveEveryStep(tmp_path))
    second = fit(tmp_path, 0, steps=11, resume=tmp_path / "4.ckpt", save=SaveEveryStep(tmp_path))
    third = fit(tmp_path, 0, resume=tmp_path / "11.ckpt")
    assert second.seen == whole.seen[4:11] and third.seen == whole.seen[11:]


def test_without_the_saved_state_the_order_would_differ(tmp_path):
    # What makes the tests above able to fail: a loader that forgets starts from 0.
    whole = fit(tmp_path, 0, save=SaveEveryStep(tmp_path))
    checkpoint = torch.load(tmp_path / "7.ckpt", weights_only=True)
    state = checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader")
    assert [s["consumed"] for s in state] == [2 * 16] and state[0]["epoch"] == 1
    torch.save(checkpoint, tmp_path / "forgets.ckpt")
    assert fit(tmp_path, 0, resume=tmp_path / "forgets.ckpt").seen != whole.seen[7:]
