"""Export a model: `python export.py checkpoint=RUN output=DIR`; `--help` explains the rest."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from mtp_lightning.cli import readable_errors


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        # Imported here, so that --help does not wait for torch.
        from mtp_lightning.interop.export import export

        export(cfg)


if __name__ == "__main__":
    main()
