"""A GGUF file in llama.cpp itself, by the package xllamacpp: its choices, and its drafts.

llama.cpp continues prompts greedily and reports the log-probability of every token; a model of this
project reads the same texts. A file with other arithmetic fails this check even if its tensors are
right.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning import llama_server
from mtp_lightning.decoding import generate
from mtp_lightning.interop.agreement import own_texts
from mtp_lightning.interop.verify import CheckFailed
from mtp_lightning.model import MTPModel

# The result of a check without the package.
ABSENT = "llama.cpp itself did not read it: pip install -e '.[engines]' lets it"
PROMPTS, _PROMPT, _NEW = 16, 8, 32
# Allowed mean difference of log-probabilities, relative to the standard deviation of the logits.
# llama.cpp rounds activations to the weights' type, and a rounding may change a token's experts.
_ALLOWED = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.05, "q8_0": 0.1}
# Shares of accepted drafts may differ by this: where the arithmetic is the same, and where other
# roundings lead to other texts.
_ACCEPTANCE, _ACCEPTANCE_ROUNDED = 0.01, 0.1


@dataclass(frozen=True)
class DraftFile:
    """A file that drafts: llama.cpp's ``draft-NAME``, its dtype, a name of ``gguf_writing.TYPES``,
    and the drafts of a round."""

    file: Path
    name: str
    dtype: str
    drafts: int


@dataclass(frozen=True)
class Continuation:
    """llama.cpp's continuation of a prompt: the new tokens, their log-probabilities (None if some
    are not reported), and the numbers of drafts and of accepted ones."""

    ids: list[int]
    logprobs: list[float] | None
    drafted: int
    accepted: int


def is_there() -> bool:
    """Whether the package is installed."""
    return find_spec("xllamacpp") is not None


def continue_prompts(
    file: Path,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    drafts: int = 0,
    drafter: DraftFile | None = None,
) -> list[Continuation]:
    """Continue prompts greedily by ``lengths`` tokens, one at a time; no token ends a text.

    Args:
        drafts: drafts per round, by the file's MTP module; 0 for none.
        drafter: another file, which drafts instead.

    Raises:
        CheckFailed: llama.cpp does not load a file.
    """
    import xllamacpp

    longest, threads = max(map(len, prompts)) + max(lengths) + drafts, torch.get_num_threads()
    params = llama_server.parameters(file, batch=1, tokens=longest, threads=threads)
    # The default rounds the cache to 16 bits.
    float32 = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_k = params.cache_type_v = float32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if drafts:
        kinds, draft = xllamacpp.common_speculative_type, params.speculative.draft
        if drafter is not None:
            draft.mparams.path = str(drafter.file)
        name = "mtp" if drafter is None else drafter.name
        kind = getattr(kinds, f"COMMON_SPECULATIVE_TYPE_DRAFT_{name.upper()}")
        params.speculative.types = [kind]
        draft.n_max, draft.n_min, draft.p_min = drafts, 0, 0.0
        draft.cache_type_k = draft.cache_type_v = float32
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise CheckFailed(
            f"llama.cpp does not load {drafter.file if drafter else file}: try its newest version "
            "(pip install -U xllamacpp), or leave the check out with verify=false."
        ) from error
    return [_ask(server, ids, n) for ids, n in zip(prompts, lengths, strict=True)]


def _ask(server: Any, ids: Sequence[int], length: int) -> Continuation:
    body = llama_server.request(ids, length) | {"n_probs": 1, "return_tokens": True}
    # Over HTTP, since only this answer has the ids of all tokens.
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    no_proxy = urllib.request.ProxyHandler({})  # the environment may name one
    with urllib.request.build_opener(no_proxy).open(request) as answer:
        completion = json.load(answer)
    tokens = [int(token) for token in completion["tokens"]]
    reported = completion.get("completion_probabilities") or ()
    return Continuation(
        ids=tokens,
        # Tokens that are part of a character are reported without one: the lengths may differ.
        logprobs=[float(t["logprob"]) for t in reported] if len(reported) == len(tokens) else None,
        drafted=int(completion["timings"].get("draft_n", 0)),
        accepted=int(completion["timings"].get("draft_n_accepted", 0)),
    )


def check(
    file: Path,
    model: MTPModel,
    tokenizer: Any,
    *,
    dtype: str,
    context: int,
    drafter: DraftFile | None = None,
) -> Iterator[str]:
    """Check that llama.cpp computes the same from a file as a model, and accepts as many drafts.

    Args:
        model: the file's model, with its rounded values, on the CPU.
        tokenizer: the file's, with ``end_ids``.
        dtype: the file's, a name of ``gguf_writing.TYPES``.
        context: tokens that the file states as its context, which llama.cpp does not exceed.
        drafter: another file, which drafts.

    Yields:
        The results, one line each.

    Raises:
        CheckFailed: llama.cpp does not load a file, or a difference beyond what the file's rounding
            explains.
    """
    prompt_len = max(1, min(_PROMPT, context // 4))
    n_new = min(_NEW, context - prompt_len - 2)
    if n_new < 1:
        yield f"llama.cpp was not asked: a context of {context} tokens is too short for a text"
        return
    prompts = _prompts(model, prompt_len)
    plain = generate(model, prompts, max_new_tokens=n_new, speculative=False)
    # llama.cpp is told not to end a text, and then never chooses a token that would.
    ends = tokenizer.end_ids
    text_lens = [[*(t in ends for t in text.token_ids), True].index(True) for text in plain]
    nonempty = [i for i, n in enumerate(text_lens) if n]
    if not nonempty:
        yield "llama.cpp was not asked: the model ends every text at once"
        return
    prompts, plain = [prompts[i] for i in nonempty], [plain[i] for i in nonempty]
    lengths = [text_lens[i] for i in nonempty]
    theirs = continue_prompts(file, prompts, lengths)
    deltas, spreads = zip(*map(lambda p, c: _compare(model, p, c), prompts, theirs), strict=True)
    share = float(torch.cat(deltas).mean() / torch.cat(spreads).mean())
    n_same = sum(c.ids == p.token_ids[:n] for c, p, n in zip(theirs, plain, lengths, strict=True))
    if not share <= _ALLOWED[dtype]:  # also true for NaN
        raise CheckFailed(
            f"llama.cpp computes something else from {file}: its log-probabilities differ by "
            f"{share:.1%} of the logits' spread, and at most {_ALLOWED[dtype]:.1%} is rounding."
        )
    yield (
        f"llama.cpp decodes {n_same} of {len(prompts)} greedy texts the same (log-probabilities "
        f"differ by {share:.1e} of the logits' spread)"
    )
    if model.depth == 0:
        return
    n_drafts = drafter.drafts if drafter else 1
    drafting = continue_prompts(file, prompts, lengths, drafts=n_drafts, drafter=drafter)
    their_counts = [(text.drafted, text.accepted) for text in drafting]
    our_counts = [
        (text.drafts, sum(text.drafts_accepted))
        for prompt, n in zip(prompts, lengths, strict=True)
        for text in generate(model, [prompt], max_new_tokens=n, draft_depth=n_drafts)
    ]
    n_equal = sum(mine == their for mine, their in zip(our_counts, their_counts, strict=True))
    n_ours, n_theirs = (sum(n for n, _ in counts) for counts in (our_counts, their_counts))
    our_share = sum(accepted for _, accepted in our_counts) / max(n_ours, 1)
    their_share = sum(accepted for _, accepted in their_counts) / max(n_theirs, 1)
    line = (
        f"llama.cpp accepts {their_share:.1%} of its {n_theirs} drafts "
        f"(draft-{drafter.name if drafter else 'mtp'}), this project {our_share:.1%} of "
        f"{n_ours}, with equal numbers in {n_equal} of {len(prompts)} texts"
    )
    exact = (drafter.dtype if drafter else dtype) == "float32"
    allowed = _ACCEPTANCE if exact else _ACCEPTANCE_ROUNDED
    # llama.cpp's module also reads the first token, which can change many drafts of a few texts.
    if abs(their_share - our_share) > allowed and 2 * n_equal <= len(prompts):
        drafting_file = drafter.file if drafter else file
        raise CheckFailed(f"{line}: the heads in {drafting_file} compute something else.")
    yield line


def _prompts(model: MTPModel, length: int) -> list[list[int]]:
    """Beginnings of texts that the model writes itself."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.trunk.vocab_size
    first = torch.randint(vocab, (PROMPTS, 1), generator=generator).tolist()
    return first if length == 1 else [t.tolist() for t in own_texts(model, first, length - 1)]


@torch.inference_mode()
def _compare(model: MTPModel, prompt: Sequence[int], text: Continuation) -> tuple[Tensor, Tensor]:
    """For each new token, the larger of two differences, and the standard deviation of the logits.

    The differences are between the log-probabilities of the token in llama.cpp (if reported) and in
    the model, and between those of the model's most likely token and of this token in the model.
    """
    tokens = [*prompt, *text.ids, *[0] * model.depth]  # the last ones are only predicted
    batch = WindowBatch(torch.tensor([tokens]), model.depth)
    logits: Tensor = model.head(model(batch)[0])[0, len(prompt) - 1 :]
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(text.ids).unsqueeze(1)).squeeze(1)
    difference = logprobs.amax(-1) - chosen
    if text.logprobs is not None:
        difference = (chosen - torch.tensor(text.logprobs)).abs().maximum(difference)
    return difference, logprobs.std(-1)
