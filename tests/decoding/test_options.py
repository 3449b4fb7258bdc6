"""One table of options: from YAML to the engine, checked once."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import pytest
from omegaconf import OmegaConf

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.options import DecodingOptions, TextOptions
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.evaluating import evaluate_decoding
from mtp_lightning.paths import CONF
from tests.decoding.models import random_prompts, small_model

# What the model decides, or who calls: no key of a config.
UNTOLD = {"max_context", "eot_id", "logprobs", "measured"}


@pytest.mark.parametrize("app", ["generate", "serve", "evaluate"])
def test_every_key_of_decoding_is_an_option_with_its_default(app: str) -> None:
    cfg = OmegaConf.load(CONF / f"{app}.yaml")
    node: Any = cfg.decode if app == "evaluate" else cfg
    named = {field.name: field.default for field in fields(DecodingOptions)}
    found = {name: node[name] for name in named if name in node}
    own = {"long", "max_new_tokens"} if app == "serve" else {"long"}  # limits of the app's own
    assert {k: list(v) if k == "stop" else v for k, v in found.items() if k not in own} == {
        k: list(named[k]) if k == "stop" else named[k] for k in found if k not in own
    }
    drafting = {"draft_depth", "draft_vocab", "min_confidence", "cache", "tree"}
    # evaluate.py measures the modules, greedily.
    drafting |= set() if app == "evaluate" else {"verify", "lookup"}
    assert drafting <= found.keys()
    if app == "generate":
        assert found.keys() == named.keys() - UNTOLD
    assert DecodingOptions.from_config(node).drafts_as_trained


def test_values_of_yaml_become_the_options_own() -> None:
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
TARGETS: dict[str, Any] = {"depth": 2, "stack": "parameter_free"}
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
    ({"lookup": -1}, "lookup must be a whole number of at least 0, not -1"),
    ({"lookup": 16}, "lookup must be a number of at most 15, not 16"),
    ({"speculative": "no"}, "speculative must be true or false, not 'no'"),
    ({"min_confidence": 2}, "min_confidence must be a number in [0, 1], not 2"),
    ({"draft_depth": 0}, "draft_depth=0 must be"),
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
    (TARGETS, {"draft_depth": 1}, "no module to draft with"),
    (TARGETS, {"tree": [2]}, "no module to draft with"),
    *((model, {"cache": "single"}, "cache=single is for a single module") for model in SEVERAL),
]


@pytest.mark.parametrize(("asked", "told"), REFUSED, ids=str)
def test_what_is_wrong_with_options_alone(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        DecodingOptions(**asked)


@pytest.mark.parametrize(("model", "asked", "told"), REFUSED_OF_A_MODEL)
def test_what_a_model_does_not_support(
    model: dict[str, Any], asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        generate(small_model(0, **model), [[1]], max_new_tokens=2, **asked)


def test_evaluation_decodes_by_the_same_options() -> None:
    class Data:
        seq_len, answer_length, tokenizer = 64, None, None

        def held_out_prompts(self, n: int, length: int, *, fewer: bool) -> Any:
            import torch

            return [torch.tensor(p) for p in random_prompts(0, (length,) * n)]

    settings = OmegaConf.load(CONF / "evaluate.yaml").decode
    settings.merge_with({"n_prompts": 2, "prompt_tokens": 20, "new_tokens": 12, "tree": [3, 1]})
    found = evaluate_decoding(small_model(2, 2), Data(), settings)  # type: ignore[arg-type]
    assert "decode/acceptance_position_1" in found and "decode/speedup" in found
    assert "decode/expected_speedup" not in found  # teacher forcing sees no tree
