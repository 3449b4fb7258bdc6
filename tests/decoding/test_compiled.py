"""Compiled decoding: its functions without a compiler, and (in slow tests) compiled."""

from __future__ import annotations

import shutil

import pytest
import torch

from mtp_lightning.decoding import compiled, generate
from mtp_lightning.decoding.compiled import CompiledSession
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.measure import pass_costs
from mtp_lightning.decoding.session import Session
from mtp_lightning.nn.experts import Experts, gathered
from tests.decoding.models import ids_of, random_prompts, small_model, steer_drafts
from tests.kernels import use_library

NEW = 14


VARIANTS = {
    "dense": {"depth": 3},
    "deepseek": {"depth": 3, "deepseek": True},
    "shared layers": {"depth": 2, "share_layers": True},
    "joint": {"depth": 3, "stack": "joint"},
    "parallel, mlp": {"depth": 2, "stack": "parallel", "correction": "mlp"},
    "linear, markov": {"depth": 3, "stack": "linear", "correction": "markov"},
    "parallel, selector": {"depth": 3, "stack": "parallel", "correction": "selector"},
    "masked": {"depth": 3, "stack": "masked"},
    "plain": {"depth": 0},
}


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "program", lambda function, inputs: function)


@pytest.fixture
def passes(mode, monkeypatch, uncompiled):
    """Passes are ``called`` as on a CPU, or ``recorded`` and replayed as on a GPU."""
    if mode == "recorded":
        play_recordings(monkeypatch)
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def play_recordings(monkeypatch):
    """Passes of a CPU read and write fixed memory, as those of a GPU do."""

    def record(function):
        outputs = [torch.full_like(x, torch.nan) for x in function()]

        def replay():
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        return replay, outputs

    monkeypatch.setattr(compiled, "record", record)
    monkeypatch.setattr(compiled, "_RECORDED", ("cpu",))


def logits_of_passes(monkeypatch, session):
    """The logits of every pass from now on, by depth and tokens, before drafts are steered."""
    logits = {}
    draft, verify = session.draft, session.verify

    def recording_draft(self, k):
        drafted = draft(self, k)
        tokens = self.tokens_BS[0, : self.n_read[0] + k].tolist()
        logits[self.n_read[0], k, tuple(tokens)] = drafted.logits_BV[0]
        return drafted

    def recording_verify(self, n_drafts):
        logits_BTV = verify(self, n_drafts)
        tokens = self.tokens_BS[0, : self.n_read[0] + 1].tolist()
        logits[self.n_read[0], 0, tuple(tokens)] = logits_BTV[0, 0]
        return logits_BTV

    monkeypatch.setattr(session, "draft", recording_draft)
    monkeypatch.setattr(session, "verify", recording_verify)
    return logits


@pytest.mark.parametrize(
    ("name", "chance", "mode"),
    [
        *((name, 0.6, "called") for name in VARIANTS),
        *((name, 0.6, "recorded") for name in ("deepseek", "linear, markov", "plain")),
        ("linear, markov", 0.0, "called"),
        ("dense", 1.0, "recorded"),
    ],
)
def test_compiled_passes_give_the_logits_and_texts_of_eager_ones(
    name, chance, mode, passes, monkeypatch
):
    settings = dict(VARIANTS[name])
    model = small_model(5, settings.pop("depth"), **settings)
    # With the long prompt, the modules' first pass is wider than a program.
    prompts = random_prompts(5, (1, 2, 4, 21))
    options = {"max_new_tokens": NEW, "batch_size": 1}
    expected = ids_of(generate(model, prompts, **options))
    logits, texts = [], []
    for session, compile in ((Session, False), (CompiledSession, True)):
        with monkeypatch.context() as patch:
            logits.append(logits_of_passes(patch, session))
            steer_drafts(patch, prompts, expected, chance=chance, session=session)
            texts.append(generate(model, prompts, compile=compile, **options))
    assert [ids_of(generations) for generations in texts] == [expected, expected]
    shared = logits[0].keys() & logits[1].keys()
    assert {k for _, k, _ in shared} == set(range(model.depth + 1))
    for key in shared:
        torch.testing.assert_close(logits[1][key], logits[0][key], rtol=1e-4, atol=1e-4)
    if chance == 1.0 and model.depth:
        assert min(g.tokens_per_step for g in texts[1]) > 1.5


@pytest.mark.parametrize("mode", ["called", "recorded"])
def test_compiled_passes_slide_and_sample_as_eager_ones(mode, passes):
    model = small_model(4, 2)
    prompts = random_prompts(4, (5, 30))
    for options in (
        {"max_new_tokens": 40, "max_context": 16, "long": "slide"},
        {"max_new_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 3},
        {"max_new_tokens": 30, "draft_depth": "auto"},
        {"max_new_tokens": 1},
    ):
        texts = [
            ids_of(generate(model, prompts, batch_size=1, compile=c, **options))
            for c in (False, True)
        ]
        assert texts[0] == texts[1], options


def test_a_growth_that_the_memory_does_not_hold_leaves_the_passes(monkeypatch):
    built = []
    monkeypatch.setattr(compiled, "program", lambda function, _: built.append(1) or function)
    with decoding_passes(model := small_model(4, 0)):
        session = CompiledSession(model, slots=1, capacity=9, max_draft=0)
        session.join([[1, 2]])
        session.verify(0)
        with monkeypatch.context() as patch, pytest.raises(AttributeError):
            patch.delattr(torch.nn.functional, "pad")
            session.reserve(1000)
        session.verify(0)
        assert len(built) == 1
        session.reserve(1000)
        session.verify(0)
        assert len(built) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("name", ["deepseek", "linear, markov"])
def test_recorded_passes_are_compiled_once(name, monkeypatch):
    """The compiler's front end traces each pass without graph breaks, once for all sessions."""
    use_library(monkeypatch, None)
    play_recordings(monkeypatch)
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile(function, backend="eager", **options)
    )
    torch.compiler.reset()
    settings = dict(VARIANTS[name])
    model = small_model(5, settings.pop("depth"), **settings)
    prompts = random_prompts(5, (1, 4, 21))
    expected = ids_of(generate(model, prompts, max_new_tokens=NEW))
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            compiled_texts = generate(model, prompts, max_new_tokens=NEW, compile=True)
        assert ids_of(compiled_texts) == expected


def test_gathered_experts_equal_the_layer_of_experts():
    torch.manual_seed(0)
    layer = Experts(8, 6, 5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, gates = torch.randn(4, 8), torch.rand(4, 2)
    chosen = torch.tensor([[0, 1], [4, 2], [3, 0], [2, 1]])
    with torch.no_grad():
        y = gathered(x, chosen, gates, layer.gate_up, layer.down)
        torch.testing.assert_close(y, layer(x, chosen, gates), rtol=1e-5, atol=1e-5)


@pytest.mark.long  # test_programs.py builds one for .ci/run
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(
    "mtp",
    [
        {},
        {"deepseek": True},
        {"stack": "joint"},
        {"stack": "joint", "deepseek": True},
        {"stack": "nextlat"},
        {"stack": "linear", "correction": "mlp"},
        {"stack": "linear", "correction": "markov"},
        {"stack": "parallel", "correction": "selector"},
        {"stack": "linear", "rank": 2},
    ],
    ids=str,
)
def test_compiled_programs_decode_as_eager_passes(mtp, tmp_path, monkeypatch):
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path))
    model = small_model(5, 2, **mtp)
    prompts = random_prompts(5, (1, 4, 21))
    expected = generate(model, prompts, max_new_tokens=NEW, batch_size=1)
    for options in ({"speculative": False}, {}):
        texts = generate(model, prompts, max_new_tokens=NEW, compile=True, **options)
        assert ids_of(texts) == ids_of(expected)
    # Every pass reads the current weights.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.1)
    expected = generate(model, prompts, max_new_tokens=NEW, batch_size=1)
    texts = generate(model, prompts, max_new_tokens=NEW, compile=True)
    assert ids_of(texts) == ids_of(expected)
    assert min(pass_costs(model, prompts[2], compile=True, repeats=2).verify) > 0
