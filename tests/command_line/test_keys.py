"""Comments of conf/ as rules for the values of keys."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mtp_lightning.command_line import keys
from mtp_lightning.command_line.conf_comments import groups
from mtp_lightning.errors import UserError


def comment(app: str, key: str) -> str:
    node, _, name = key.rpartition(".")
    return keys.of_node(node, app).keys[name]


@pytest.mark.parametrize(
    ("app", "key", "value"),
    [
        ("export", "layout", "vLLM"),  # words of the comments' prose
        ("export", "dtype", "weights"),
        ("config", "trainer.max_steps", "steps"),
        ("config", "trainer.deterministic", "kernels"),
        ("config", "seed", "of"),
        ("generate", "max_new_tokens", "tokens"),
        ("generate", "draft_depth", "per"),
        ("export", "layout", "other"),
    ],
)
def test_a_word_that_a_comment_only_mentions_is_refused(app: str, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}.*{value}"):
        keys.require_allowed(key, value, comment(app, key))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trainer.compile", "trainer.compile (unless auto) must be true or false, not 'foo'."),
        ("trainer.deterministic", "trainer.deterministic (unless warn) must be true or false"),
        ("trainer.devices", "trainer.devices (unless auto) must be a whole number in [1, 1024]"),
        ("trainer.num_threads", "trainer.num_threads (unless null) must be a whole number"),
    ],
)
def test_a_refusal_names_the_words_that_a_key_takes(key: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        keys.require_allowed(key, "foo", comment("config", key))


def test_a_number_is_required_where_the_comment_says_so() -> None:
    rules = keys.of_class("data_modules.tasks.Navigation")
    assert rules is not None
    with pytest.raises(UserError, match="must be a number"):
        keys.require_allowed("density", "random", rules.keys["density"])


@pytest.mark.parametrize(
    ("app", "key", "value"),
    [
        ("config", "trainer.devices", "auto"),
        ("config", "trainer.deterministic", "warn"),
        ("config", "trainer.precision", "bf16-true"),
        ("evaluate", "decode.draft_depth", "auto"),
        ("evaluate", "eval_bytes", "all"),
        ("generate", "draft_depth", "auto"),
        ("serve", "draft_depth", "auto"),
        ("export", "layout", "speculators"),
        ("export", "dtype", "q8_0"),
    ],
)
def test_a_declared_word_is_accepted(app: str, key: str, value: str) -> None:
    keys.require_allowed(key, value, comment(app, key))


def test_every_default_is_accepted() -> None:
    for group, options in groups().items():
        if group.partition("/")[0] in ("sweeps", "hydra"):
            continue
        for option in options.values():
            for key in option.keys:
                value: Any = option.content
                for name in key.name.split("."):
                    value = value[name]
                if key.comment and value != "???":
                    keys.require_allowed(f"{option.name}:{key.name}", value, key.comment)
