"""Compares the choices of modules with the trunk's, on texts that the trunk writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.config import Concat, InputNorm
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.context import ForwardContext

# The trunk continues these texts, and drafts are compared with its continuations.
_BEGINNINGS = (
    "The history of the city begins with the river, which",
    "def read_lines(path):\n    with open(path) as file:\n        ",
    "Question: Why is the sky blue?\nAnswer: The sky is blue because",
    "Once upon a time there was a small village, and in it",
)
_PROMPT = 8
_CONVENTIONS = tuple(itertools.product(get_args(InputNorm), get_args(Concat)))
_WORDS = {
    "post": "the state after the final norm",
    "pre": "the state before the final norm",
    "embedding_first": "embedding first",
    "hidden_first": "state first",
}
# Standard errors by which one choice must beat another on the positions where the two differ.
_ERRORS = 3.0
# Useful layers agree with the trunk more often than its most common token would, by this share.
ABOVE = 0.02
Convention = tuple[str, str]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Agreement(Generic[Key]):
    """The agreement of modules with the trunk."""

    rights: dict[Key, Tensor]  # by module, whether its choice is the trunk's, bool [N]
    constant: float  # the share that the trunk's most common choice would get everywhere

    @property
    def shares(self) -> dict[Key, float]:
        """The share of positions, by module."""
        return {key: float(right.float().mean()) for key, right in self.rights.items()}

    def fell_from(self, before: Agreement[Key]) -> bool:
        """Whether a module is clearly worse than before."""
        return any(clearly_more(before.rights[key], now) for key, now in self.rights.items())


def _join(texts: Iterable[tuple[Tensor, dict[Key, Tensor]]]) -> Agreement[Key]:
    """The agreement on several texts: for each, the trunk's choices, ids [T], and the ``rights`` of
    every module."""
    chosen, rights = zip(*texts, strict=True)
    joined = {key: torch.cat([right[key] for right in rights]) for key in rights[0]}
    return Agreement(joined, most_common_share(torch.cat(chosen)))


def most_common_share(ids: Tensor) -> float:
    """The share of the most common of some ids [N]."""
    return int(ids.bincount().max()) / len(ids)


def described(convention: Convention) -> str:
    """A convention in words."""
    return ", ".join(_WORDS[part] for part in convention)


def prompts_of(model: MTPModel, tokenizer: Any) -> list[list[int]]:
    """Beginnings of texts, or random ids where there is no tokenizer that reads them."""
    vocab_size = model.config.trunk.vocab_size
    if tokenizer is not None and tokenizer.reads_text:
        prompts = [[int(i) for i in tokenizer.encode_prompt(text)] for text in _BEGINNINGS]
        if max(map(max, prompts)) < vocab_size:
            return prompts
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (len(_BEGINNINGS), _PROMPT), generator=generator).tolist()


def own_texts(model: MTPModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Tensor]:
    """The trunk's continuations of the prompts, sampled, since greedy texts soon repeat."""
    continuations = generate(
        model, prompts, max_new_tokens=new_tokens, speculative=False, temperature=1.0
    )
    return [torch.tensor([*p, *g.token_ids]) for p, g in zip(prompts, continuations, strict=True)]


@torch.inference_mode()
def agreement_of_depths(
    model: MTPModel, texts: Sequence[Tensor], draft_vocab: int | None = None
) -> Agreement[int]:
    """Compare each depth's choice, among the first ``draft_vocab`` ids if given, with the trunk's
    choice at the token that it predicts."""

    def compare(text: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        batch = WindowBatch(text.unsqueeze(0), model.depth)
        states = model(batch)
        chosen = model.head(states.pop(0))[0].argmax(-1)
        matches = {}
        for k, h_BTC in states.items():
            logits_BTV = model.draft_logits(k, h_BTC, batch.tokens[:, k : k + h_BTC.shape[1]])
            matches[k] = logits_BTV[0, :-k, :draft_vocab].argmax(-1) == chosen[k:]
        return chosen, matches

    return _join(map(compare, texts))


@torch.inference_mode()
def agreement_of_conventions(
    model: MTPModel, texts: Sequence[Tensor], draft_vocab: int | None = None
) -> Agreement[Convention]:
    """Compare the choice of depth 1, as a sequential module of each convention, with the trunk's.
    The choice is among the first ``draft_vocab`` ids, if given."""
    stacks, trunk = {}, model.config.trunk
    for input_norm, concat in _CONVENTIONS:
        config = SequentialConfig(depth=1, input_norm=input_norm, concat=concat)  # type: ignore[arg-type]
        stack = config.build(trunk)
        stack.load_state_dict(model.mtp.state_dict())
        stacks[input_norm, concat] = stack.eval()

    def compare(text: Tensor) -> tuple[Tensor, dict[Convention, Tensor]]:
        tokens = text.unsqueeze(0)
        embedded = model.trunk.embedding(tokens)
        n = len(text) - 1  # the last position has no next token to read
        ctx = ForwardContext.of_window(trunk, len(text), device=text.device)
        output = model.trunk(embedded, ctx)
        chosen, rights = model.head(output.final)[0, 1:].argmax(-1), {}
        for (input_norm, concat), stack in stacks.items():
            hidden = model.trunk.state(output, "final", input_norm)
            ctx = ForwardContext.of_window(trunk, n, device=text.device)
            inputs = StackInputs(hidden[:, :n], tokens, embedded, ctx)
            logits_BTV = model.head(dict(stack.states(inputs, [1]))[1])
            rights[input_norm, concat] = logits_BTV[0, :, :draft_vocab].argmax(-1) == chosen
        return chosen, rights

    return _join(map(compare, texts))


def clearly_best(rights: dict[Convention, Tensor], meant: Convention) -> Convention:
    """The convention that chooses best, or the layout's unless it is clearly worse."""
    best = max(rights, key=lambda convention: int(rights[convention].sum()))
    return best if clearly_more(rights[best], rights[meant]) else meant


def clearly_more(one: Tensor, other: Tensor) -> bool:
    """Whether ``one`` is true at more positions than ``other`` beyond chance (McNemar's test); both
    are bool [N]."""
    won, lost = int((one & ~other).sum()), int((other & ~one).sum())
    return won - lost > _ERRORS * (won + lost) ** 0.5
