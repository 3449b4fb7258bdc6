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

PROMPTS, _PROMPT, _NEW = 16, 8, 32
# Allowed mean difference of log-probabilities, relative to the standard deviation of the logits.
# llama.cpp rounds activations to the weights' type, and a rounding may change a token's experts.
_ALLOWED = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.05, "q8_0": 0.1}
# Shares of accepted drafts may differ by this, where the arithmetic is the same.
_ACCEPTANCE = 0.01


@dataclass(frozen=True)
class Continued:
    """llama.cpp's continuation of a prompt.

    Attributes:
        ids: the new tokens.
        logprobs: the log-probability of each; None if some are not reported.
        drafted: number of drafts.
        accepted: number of accepted drafts.
    """

    ids: list[int]
    logprobs: list[float] | None
    drafted: int
    accepted: int


def is_there() -> bool:
    """Whether the package is installed."""
    return find_spec("xllamacpp") is not None


def continued(
    file: Path, prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, drafts: int = 0
) -> list[Continued]:
    """Continue prompts greedily, one at a time; no token ends a text.

    Args:
        file: a GGUF file.
        prompts: token ids.
        lengths: new tokens of each.
        drafts: drafts per round, by the file's MTP module; 0 for none.
    """
    import xllamacpp

    longest, threads = max(map(len, prompts)) + max(lengths) + drafts, torch.get_num_threads()
    params = llama_server.parameters(file, batch=1, tokens=longest, threads=threads)
    # The default rounds the cache to 16 bits.
    whole = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_k = params.cache_type_v = whole
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if drafts:
        kinds = xllamacpp.common_speculative_type
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        own = params.speculative.draft
        own.n_max, own.n_min, own.p_min = drafts, 0, 0.0
        own.cache_type_k = own.cache_type_v = whole
    server = xllamacpp.Server(params)
    return [_ask(server, ids, n) for ids, n in zip(prompts, lengths, strict=True)]


def _ask(server: Any, ids: Sequence[int], length: int) -> Continued:
    asked = llama_server.request(ids, length) | {"n_probs": 1, "return_tokens": True}
    # Over HTTP, since only this answer has the ids of all tokens.
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)
    tokens = [int(token) for token in found["tokens"]]
    told = found.get("completion_probabilities") or ()
    return Continued(
        ids=tokens,
        # Tokens that are part of a character are reported without one: the lengths may differ.
        logprobs=[float(t["logprob"]) for t in told] if len(told) == len(tokens) else None,
        drafted=int(found["timings"].get("draft_n", 0)),
        accepted=int(found["timings"].get("draft_n_accepted", 0)),
    )


def check(
    file: Path, model: MTPModel, tokenizer: Any, *, dtype: str, context: int
) -> Iterator[str]:
    """Check that llama.cpp computes the same from a file as a model, and accepts as many drafts.

    Args:
        file: a GGUF file.
        model: what the file holds, with its rounded values, on the CPU.
        tokenizer: the file's, with ``end_ids``.
        dtype: the file's, a name of ``gguf_writing.TYPES``.
        context: tokens that the file states as its context, which llama.cpp does not exceed.

    Yields:
        The results, one line each.

    Raises:
        CheckFailed: a difference beyond what the file's rounding explains.
    """
    begun = max(1, min(_PROMPT, context // 4))
    new = min(_NEW, context - begun - 2)
    if new < 1:
        yield f"llama.cpp was not asked: a context of {context} tokens is too short for a text"
        return
    prompts = _prompts(model, begun)
    plain = generate(model, prompts, max_new_tokens=new, speculative=False, eot_id=None)
    # llama.cpp is told not to end a text, and then never chooses a token that would.
    ends = tokenizer.end_ids
    ended = [[*(t in ends for t in text.token_ids), True].index(True) for text in plain]
    kept = [i for i, n in enumerate(ended) if n]
    if not kept:
        yield "llama.cpp was not asked: the model ends every text at once"
        return
    prompts, plain = [prompts[i] for i in kept], [plain[i] for i in kept]
    lengths = [ended[i] for i in kept]
    theirs = continued(file, prompts, lengths)
    apart, spread = zip(*map(lambda p, c: _compared(model, p, c), prompts, theirs), strict=True)
    share = float(torch.cat(apart).mean() / torch.cat(spread).mean())
    same = sum(c.ids == p.token_ids[:n] for c, p, n in zip(theirs, plain, lengths, strict=True))
    if not share <= _ALLOWED[dtype]:  # also true for NaN
        raise CheckFailed(
            f"llama.cpp computes something else from {file}: its log-probabilities differ by "
            f"{share:.1%} of the logits' spread, and at most {_ALLOWED[dtype]:.1%} is rounding."
        )
    yield (
        f"llama.cpp decodes {same} of {len(prompts)} greedy texts the same (log-probabilities "
        f"differ by {share:.1e} of the logits' spread)"
    )
    if model.depth == 0:
        return
    drafted = continued(file, prompts, lengths, drafts=1)
    own = [
        text
        for prompt, n in zip(prompts, lengths, strict=True)
        for text in generate(model, [prompt], max_new_tokens=n, eot_id=None, draft_depth=1)
    ]
    n_ours, n_found = sum(text.drafts for text in own), sum(text.drafted for text in drafted)
    ours = sum(text.drafts_accepted[0] for text in own) / max(n_ours, 1)
    found = sum(text.accepted for text in drafted) / max(n_found, 1)
    line = (
        f"llama.cpp accepts {found:.1%} of its {n_found} drafts (draft-mtp), this project "
        f"{ours:.1%} of {n_ours}"
    )
    if dtype == "float32" and abs(found - ours) > _ACCEPTANCE:
        raise CheckFailed(f"{line}: the MTP module in {file} computes something else.")
    yield line


def _prompts(model: MTPModel, length: int) -> list[list[int]]:
    """Beginnings of texts that the model writes itself."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.trunk.vocab_size
    first = torch.randint(vocab, (PROMPTS, 1), generator=generator).tolist()
    return first if length == 1 else [t.tolist() for t in own_texts(model, first, length - 1)]


@torch.inference_mode()
def _compared(model: MTPModel, prompt: Sequence[int], said: Continued) -> tuple[Tensor, Tensor]:
    """For each new token, the larger of two differences, and the standard deviation of the logits.

    The differences are between the log-probabilities of the token in llama.cpp (if reported) and in
    the model, and between those of the model's most likely token and of this token in the model.
    """
    read = [*prompt, *said.ids, *[0] * model.depth]  # the last ones are only predicted
    batch = WindowBatch(torch.tensor([read]), model.depth)
    logits: Tensor = model.head(model(batch)[0])[0, len(prompt) - 1 :]
    own = logits.float().log_softmax(-1)
    chosen = own.gather(1, torch.tensor(said.ids).unsqueeze(1)).squeeze(1)
    apart = own.amax(-1) - chosen
    if said.logprobs is not None:
        apart = (chosen - torch.tensor(said.logprobs)).abs().maximum(apart)
    return apart, own.std(-1)
