"""Small models for the decoding tests, drafts of a chosen quality, and reference decoders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_modules.tokenizers import ByteTokenizer
from data_modules.windows import WindowBatch
from mtp_lightning.decoding import Generation, generate
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.fused import fused_passes
from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.sequence import TextSequence
from mtp_lightning.decoding.session import DepthDraft, Session
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.opening import OpenedModel
from mtp_lightning.runtime import threads
from tests.deepseek import trunk as deepseek_trunk
from tests.models import build

VOCAB = 37
NEW = 14  # tokens of a text


def small_model(
    seed: int,
    depth: int,
    *,
    vocab: int = VOCAB,
    kv: int = 2,
    deepseek: bool = False,
    stack: str | type[MTPConfig] = "sequential",
    **mtp,
) -> MTPModel:
    """A random model of two layers; its norm gains are random too, so that none can be skipped.

    The weights are large and the head is not tied: greedy text would otherwise repeat one token.
    With ``deepseek``, the model has latent attention and experts, also in the modules' blocks.
    """
    shape = {"vocab_size": vocab, "d_model": 32, "d_ff": 48, "tie_embeddings": False}
    if deepseek:
        experts = {"n_routed": 16, "top_k": 4, "first_k_dense": 0}
        trunk = deepseek_trunk(n_layers=2, init_std=0.3, experts=experts, **shape)
    else:
        trunk = TrunkConfig(n_layers=2, n_heads=4, n_kv_heads=kv, init_std=0.3, **shape)
    kind = MTPConfig.find(stack) if isinstance(stack, str) else stack
    config = kind(depth=depth, **mtp) if depth else NoMTPConfig()
    return build(trunk, config, seed).eval()


def opened_model(seed: int, *, seq_len: int, depth: int = 2, path: Path = Path("x")) -> OpenedModel:
    """A small model of bytes, as if opened from a path."""
    return OpenedModel(
        model=small_model(seed, depth, vocab=257),
        tokenizer_state=ByteTokenizer().state(),
        run_config={"data": {"seq_len": seq_len}},
        step=0,
        path=path,
    )


def generation(accepted, reached, passes, new, **more) -> Generation:
    """A generated text with these counts."""
    return Generation(
        token_ids=[0] * new, text=None, finish_reason="length", seconds=1.0, verify_passes=passes,
        drafts_accepted=accepted, drafts_reached=reached, accepted_mask=[False] * new, **more,
    )  # fmt: skip


def random_prompts(seed: int, lengths: tuple[int, ...], vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def ids_of(generations: Iterable[Generation]) -> list[list[int]]:
    """The tokens of each text."""
    return [generation.token_ids for generation in generations]


def run_to_end(engine: Engine, requests: list[Request]) -> list[TextSequence]:
    """Decodes the requests together until all texts have ended."""
    sequences = engine.add(requests)
    while engine.sequences:
        engine.step()
    return sequences


def plain_ids(model, prompts, n_new=NEW):
    """The texts of the prompts, each decoded alone and one token at a time."""
    return ids_of(generate(model, [p], max_new_tokens=n_new, speculative=False)[0] for p in prompts)


@torch.no_grad()
def teacher_forced(model: MTPModel, tokens: list[int], depth: int) -> list[Tensor]:
    """Logits [T, V] of depths 0 .. ``depth`` over a window of all ``tokens``, with the scores of
    drafts.

    Position i of depth k reads tokens up to i + k; positions that would read beyond the end are
    left out. Shared layers are applied ``depth`` times.
    """
    seq_len = len(tokens) - depth
    if depth > model.depth:
        config = replace(model.config.mtp, depth=depth)
        deeper = MTPModel(ModelConfig(trunk=model.config.trunk, mtp=config))
        deeper.load_state_dict(model.state_dict())
        model = deeper
    # None of the returned logits reads the padding at the end.
    window = torch.tensor([[*tokens, *[0] * (model.depth + 1)]])[:, : seq_len + model.depth + 1]
    hidden = model(WindowBatch(window, model.depth))
    assert hidden[0].shape[1] == seq_len
    depths = [
        model.draft_logits(k, hidden[k], window[:, k : seq_len + k]) for k in range(1, depth + 1)
    ]
    return [model.head(hidden[0])[0], *(logits[0] for logits in depths)]


def check_passes(model, prompts, continuations, drafted, monkeypatch):
    """From now on, compare the logits of every pass over the tokens of a text with teacher forcing;
    returns the numbers of compared passes by depth."""
    texts = [p + c for p, c in zip(prompts, continuations, strict=True)]
    expected = {tuple(text): teacher_forced(model, text + [0] * drafted, drafted) for text in texts}
    compared = {"trunk": 0, **{k: 0 for k in range(1, drafted + 1)}}
    draft, verify = Session.draft, Session.verify

    def text_of(session, row):
        tokens = session.tokens_BS[row, : session.n_read[row] + 1].tolist()
        (text,) = {tuple(t) for t in texts if t[: len(tokens)] == tokens}
        return text

    def check(logits, text, depth, position):
        torch.testing.assert_close(logits, expected[text][depth][position], rtol=1e-4, atol=1e-4)

    def checked_draft(session, k):
        drafted = draft(session, k)
        for row, n in enumerate(session.n_read):
            text = text_of(session, row)
            # Depth k at n - 1 has read tokens up to n - 1 + k, drafts if k > 1.
            read = session.tokens_BS[row, : n + k].tolist()
            if list(text[: n + k]) == read:
                check(drafted.logits_BV[row], text, k, n - 1)
                compared[k] += 1
        return drafted

    def checked_verify(session, n_drafts):
        logits = verify(session, n_drafts)
        for row, n in enumerate(session.n_read):
            text = text_of(session, row)
            for j in range(n_drafts + 1):
                if list(text[: n + j + 1]) == session.tokens_BS[row, : n + j + 1].tolist():
                    check(logits[row, j], text, 0, n + j)
                    compared["trunk"] += 1
        return logits

    monkeypatch.setattr(Session, "draft", checked_draft)
    monkeypatch.setattr(Session, "verify", checked_verify)
    return compared


def steer_drafts(
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    continuations: list[list[int]],
    *,
    chance: float,
    seed: int = 0,
    session: type[Session] = Session,
) -> None:
    """Make the drafts of each prompt agree with its continuation with probability ``chance``.

    A row's tokens say which text it is, also after its context slid. The modules run as usual;
    only their logits are replaced.
    """
    texts = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    original = session.draft
    generator = torch.Generator().manual_seed(seed)

    def draft(self: Session, k: int) -> DepthDraft:
        logits, confidence = original(self, k)
        steered = torch.zeros_like(logits)
        for row, n in enumerate(self.n_read):
            tokens = self.tokens_BS[row, : n + 1].tolist()
            following = next(
                (
                    text[start + n + 1 :]
                    for text in texts
                    for start in range(len(text) - n)
                    if text[start : start + n + 1] == tokens
                ),
                [],
            )
            best = following[k - 1] if k <= len(following) else 0
            if torch.rand((), generator=generator) >= chance:
                best = (best + 1) % logits.shape[-1]
            steered[row, best] = 10.0
        return DepthDraft(steered, confidence)

    monkeypatch.setattr(session, "draft", draft)


def assert_wide_passes_have_the_bits_of_single_ones(model, *, n_threads, rows):
    """Reads a text in passes of three tokens, and again one by one, and compares the logits."""
    (tokens,) = random_prompts(3, (40,))
    with threads(n_threads), torch.inference_mode(), fused_passes(model):
        together, single = (Session(model, slots=rows, capacity=48, max_draft=2) for _ in range(2))
        for session in (together, single):
            session.join([tokens[:10]] * rows)
            session.tokens_BS[:, : len(tokens)] = torch.tensor(tokens)
        for start in range(10, 34, 3):
            wide = together.verify(2)
            together.accept([2] * rows)
            for j in range(3):
                assert torch.equal(single.verify(0)[:, 0], wide[:, j]), (start, j)
                single.accept([0] * rows)


class Letters:
    """A tokenizer whose token i is one character; the last id ends a text."""

    eot_id = 36
    end_ids: tuple[int, ...] = (36,)

    def decode(self, ids):
        return "".join("abcdefghijklmnopqrstuvwxyz0123456789$"[i] for i in ids)
