"""Loggers of a run, one file each. None of them uses the network for more than the user has set up:
libraries that report on their use to those who make them are told not to, before they are imported.
"""

import os

for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("WANDB_ERROR_REPORTING", "false"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),  # Trackio's
):
    os.environ.setdefault(_name, _value)
