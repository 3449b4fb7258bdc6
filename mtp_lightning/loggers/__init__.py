"""Loggers of a run, one file each. None uses the network beyond what the user has set up:
telemetry of the services' libraries is switched off before they are imported.
"""

import os

for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("WANDB_ERROR_REPORTING", "false"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),  # Trackio's
):
    os.environ.setdefault(_name, _value)
