"""Decoding options: their defaults in conf/, conversion from YAML, and refused combinations."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.options import DecodingOptions, TextOptions
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.evaluating import evaluate_decoding
from mtp_lightning.paths import CONF
from tests.decoding.models import random_prompts, small_model

# Set by the model or the calling code, and not in a config.
NOT_IN_CONFIGS = {"max_context", "eot_id", "logprobs", "measured"}


@pytest.mark.parametrize("app", ["generate", "serve", "evaluate"])
def test_the_decoding_keys_of_an_app_have_the_defaults_of_the_options(app: str) -> None:
    cfg = OmegaConf.load(CONF / f"{app}.yaml")
    node: Any = cfg.decode if app == "evaluate" else cfg
    defaults = {field.name: field.default for field in fields(DecodingOptions)}
    values = {name: node[name] for name in defaults if name in node}
    differ = {"long", "max_new_tokens"} if app == "serve" else {"long"}  # the app has its limits
    for key in values.keys() - differ:
        assert values[key] == (list(defaults[key]) if key == "stop" else defaults[key]), key
    drafting = {"draft_depth", "draft_vocab", "min_confidence", "cache", "tree"}
    # evaluate.py measures the modules with greedy text.
    drafting |= set() if app == "evaluate" else {"verify", "lookup"}
    assert drafting <= values.keys()
    if app == "generate":
        assert values.keys() == defaults.keys() - NOT_IN_CONFIGS
    assert DecodingOptions.from_config(node).drafts_as_trained


def test_values_of_yaml_are_converted() -> None:
    cfg = OmegaConf.create({"stop": ["a", 5], "tree": [3, 2], "batch_size": None, "other": 1})
    options = DecodingOptions.from_config(cfg, max_context=7)
    assert options.stop == ("a", "5") and options.tree is not None and options.tree.depth == 2
    assert options.max_context == 7 and options.slots == 8 and not options.drafts_as_trained
    plain = options.plain()
    assert plain.tree is None and not plain.speculative and plain.stop == options.stop
    assert DecodingOptions.from_config({"stop": "ab", "compile": True}).slots == 1
    request = options.request([1], 4)
    assert (request.index, request.stop) == (4, ("a", "5"))
    assert {field.name for field in fields(request)} == {
        *(field.name for field in fields(TextOptions)),
        "prompt",
        "index",
        "draft_depth",
    }


TREE = {"tree": [2, 1]}
PARAMETER_FREE: dict[str, Any] = {"depth": 2, "stack": "parameter_free"}
RANK_2: dict[str, Any] = {"depth": 2, "stack": "linear", "rank": 2}
# Models that do not draft by a single module.
SEVERAL: list[dict[str, Any]] = [{"depth": 2}, {"depth": 2, "stack": "nextlat"}, {"depth": 0}]
# Options that are refused whatever the model is, and words of the message.
REFUSED = [
    ({**TREE, "speculative": False}, "tree=[2, 1] does not go together with speculative=false"),
    ({**TREE, "draft_depth": 2}, "tree=[2, 1] does not go together with draft_depth=2"),
    ({**TREE, "draft_depth": "auto"}, "does not go together with draft_depth=auto"),
    ({**TREE, "min_confidence": 0.5}, "with min_confidence=0.5"),
    ({**TREE, "cache": "single"}, "tree=[2, 1] does not go together with cache=single"),
    ({**TREE, "compile": True}, "tree=[2, 1] does not go together with compile=true"),
    ({**TREE, "lookup": 2}, "lookup=2 does not go together with tree=[2, 1]"),
    ({"lookup": 2, "compile": True}, "lookup=2 does not go together with compile=true"),
    ({"draft_vocab": 3, "compile": True}, "draft_vocab=3 does not go together with compile="),
    ({"draft_vocab": 3, "speculative": False}, "with speculative=false"),
    ({"draft_depth": 1, "speculative": False}, "with speculative=false"),
    ({"cache": "single", "speculative": False}, "with speculative=false"),
    ({"cache": "single", "compile": True}, "cache=single does not go together with compile="),
    ({"min_confidence": 0.5, "speculative": False}, "with speculative=false"),
    ({"verify": "block", "speculative": False}, "verify=block does not go together with spec"),
    ({"verify": "block", **TREE}, "verify=block does not go together with tree=[2, 1]"),
    ({"verify": "all"}, "verify=all is unknown: choose one of token, block"),
    ({"cache": "both"}, "cache=both is unknown: choose one of per_depth, single"),
    ({"compile": True, "batch_size": 2}, "set batch_size=1, not 2"),
    ({"long": "cut"}, "long=cut is unknown"),
    ({"max_context": 0}, "max_context must be a whole number of at least 1, not 0"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
    ({"logprobs": -1}, "logprobs must be a whole number of at least 0, not -1"),
    ({"lookup": -1}, "lookup must be a whole number in [0, 15], not -1"),
    ({"lookup": 16}, "lookup must be a whole number in [0, 15], not 16"),
    ({"speculative": "no"}, "speculative must be true or false, not 'no'"),
    ({"min_confidence": 2}, "min_confidence must be a number in [0, 1], not 2"),
    ({"draft_depth": 0}, "draft_depth=0 must be a whole number from 1 to 15"),
    ({"draft_depth": 16}, "draft_depth=16 must be a whole number from 1 to 15"),
    ({"draft_depth": "deep"}, "draft_depth=deep must be"),
    ({"draft_vocab": 0}, "draft_vocab must be a whole number of at least 1, not 0"),
    ({"tree": [3], "draft_vocab": 2}, "draft_vocab must be a whole number of at least 3"),
    ({"tree": 3}, "tree=3 must be a list of whole numbers of at least 1, as [3,2]"),
    ({"tree": []}, "must be a list of whole numbers"),
    ({"tree": [2, 0]}, "must be a list of whole numbers"),
    ({"tree": [4, 3]}, "drafts 16 tokens a round: use one of at most 15"),
    ({"stop": 5}, "stop=5 must be a string or a list"),
    ({"stop": [""]}, "at least one character"),
    ({"seed": 0.5}, "seed must be a whole number, not 0.5"),
    ({"seed": None}, "seed must be a whole number, not None"),
    ({"max_new_tokens": None}, "max_new_tokens must be a whole number of at least 1, not None"),
    ({"eot_id": "x"}, "eot_id must be a whole number of at least -1, not 'x'"),
    ({"temperature": -1}, "temperature=-1"),
    ({"temperature": math.nan}, "temperature=nan"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_p": -0.1}, "top_p=-0.1"),
    ({"top_p": 1.5}, "top_p=1.5 must be a number from 0"),
]
# A model, options that it does not support, and words of the message.
REFUSED_OF_A_MODEL = [
    ({"depth": 2}, {"draft_depth": 3}, "draft_depth=3, but the model drafts 2"),
    ({"depth": 2}, {"tree": [3, 2, 1]}, "[3, 2, 1] drafts 3 tokens deep, but the model drafts 2"),
    ({"depth": 1, "vocab": 5}, {"tree": [6]}, "more candidates than the model's 5 tokens"),
    ({"depth": 2, "vocab": 5}, {"draft_vocab": 6}, "draft_vocab=6, but the model has 5 tokens"),
    (RANK_2, {"draft_vocab": 9}, "not go together with mtp.rank=2"),
    ({"depth": 0}, {"draft_vocab": 9}, "no MTP depth to draft with"),
    ({"depth": 0}, {"draft_depth": 1}, "no MTP depth to draft with"),
    (PARAMETER_FREE, {"draft_depth": 1}, "no module to draft with"),
    (PARAMETER_FREE, {"tree": [2]}, "no module to draft with"),
    *((model, {"cache": "single"}, "cache=single is for a single module") for model in SEVERAL),
]


@pytest.mark.parametrize(
    ("depth", "share_layers", "default", "auto"),
    [(3, False, 3, 3), (3, True, 3, 6), (9, True, 9, 15), (17, False, 15, 15), (17, True, 15, 15)],
)
def test_a_round_drafts_no_more_tokens_than_one_pass_verifies_exactly(
    depth: int, share_layers: bool, default: int, auto: int
) -> None:
    """Passes of up to 16 tokens have the bits of single passes."""
    model = small_model(0, depth, share_layers=share_layers)
    assert DecodingOptions().max_draft(model) == default
    assert DecodingOptions(draft_depth="auto").max_draft(model) == auto


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        DecodingOptions(**options)


@pytest.mark.parametrize(("model", "options", "message"), REFUSED_OF_A_MODEL, ids=str)
def test_options_that_a_model_does_not_support_are_refused(
    model: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        generate(small_model(0, **model), [[1]], max_new_tokens=2, **options)


def test_evaluation_decodes_with_a_tree() -> None:
    class Data:
        seq_len, answer_length, tokenizer = 64, None, None

        def held_out_prompts(self, n: int, length: int, *, fewer: bool) -> Any:
            return [torch.tensor(p) for p in random_prompts(0, (length,) * n)]

    settings = OmegaConf.load(CONF / "evaluate.yaml").decode
    settings.merge_with({"n_prompts": 2, "prompt_tokens": 20, "new_tokens": 12, "tree": [3, 1]})
    values = evaluate_decoding(small_model(2, 2), Data(), settings)  # type: ignore[arg-type]
    assert "decode/acceptance_position_1" in values and "decode/speedup" in values
    assert "decode/expected_speedup" not in values  # teacher forcing has no tree
