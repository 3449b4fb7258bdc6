"""Continue text: `python generate.py checkpoint=RUN prompt=TEXT`; `--help` explains the rest."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from mtp_lightning.cli import readable_errors


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        # Imported here, so that --help does not wait for torch.
        from mtp_lightning.generation import generate_text

        generate_text(cfg)


if __name__ == "__main__":
    main()
