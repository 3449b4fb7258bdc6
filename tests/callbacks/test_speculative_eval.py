"""The decoding check of a validation."""

from __future__ import annotations

import pytest

from mtp_lightning.callbacks.speculative_eval import SpeculativeEval


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="n_prompts must be a whole number of at least 1, not 0"):
        SpeculativeEval(n_prompts=0)
