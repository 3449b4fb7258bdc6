"""Train a model: `python train.py [overrides]`; `python train.py --help` explains them."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from mtp_lightning.cli import readable_errors


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    with readable_errors():
        # Imported here, so that --help does not wait for torch.
        from mtp_lightning.experiment import train

        return train(cfg)["val/loss_depth_0"]


if __name__ == "__main__":
    main()
