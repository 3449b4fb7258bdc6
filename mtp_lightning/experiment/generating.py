"""Generates text from prompts and prints it: the work of ``generate.py``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from mtp_lightning.command_line import quote
from mtp_lightning.command_line.check_config import require_prompts
from mtp_lightning.decoding import Generation, generate
from mtp_lightning.decoding.options import DecodingOptions, not_together
from mtp_lightning.decoding.paying import with_measured_depth
from mtp_lightning.decoding.precision import (
    AUTO,
    check_precision,
    packer_after_rounding,
    use_activations,
    use_precision,
)
from mtp_lightning.decoding.sequence import Fresh, rates
from mtp_lightning.errors import UserError, counted
from mtp_lightning.experiment.text_stream import (
    Brackets,
    Colors,
    TextStream,
    cost_line,
    ends_at_once,
    wants_colors,
)
from mtp_lightning.opening import OpenedModel, draft_vocab_of, open_model
from mtp_lightning.runtime import pick_accelerator, set_threads

# The keys that decide how weights and their products are rounded.
_PRECISION = ("precision", "head_precision", "activations")
# The values of a text in output=json.
_REPORTED = (
    *("text", "token_ids", "new_tokens", "seconds", "tokens_per_second", "verify_passes"),
    *("tokens_per_step", "acceptance", "lookups", "lookups_accepted", "finish_reason"),
)


def generate_text(cfg: Any) -> list[Generation]:
    """Continue the prompts of ``conf/generate.yaml``; print the texts to standard output, and
    remarks about them to standard error.

    Raises:
        UserError: an option is out of range, there is no prompt, or the checkpoint is damaged or
            foreign.
        OSError: a file is missing.
    """
    prompts = checked_prompts(cfg)
    run = open_from_config(cfg)
    options = decoding_options(cfg, run, rows=len(prompts))
    output = _Output(cfg, run, prompts)
    on_tokens = output.add if output.streams else None
    began = time.perf_counter()  # the first start with a model has measured it for seconds
    try:
        texts = continue_prompts(run, prompts, options, on_tokens=on_tokens, on_end=output.end)
    except BaseException:
        output.break_off()
        raise
    output.remark(texts, time.perf_counter() - began)
    return texts


class _Output:
    """Prints texts: a single one while it grows, several in order as they are finished; with
    ``output=json`` an object for each finished text."""

    def __init__(self, cfg: Any, run: OpenedModel, prompts: Sequence[str]) -> None:
        self.cfg, self.single, self.terminal = cfg, len(prompts) == 1, sys.stdout.isatty()
        self.marks: Colors | Brackets | None = None
        if cfg.show_drafts:
            self.marks = Colors() if wants_colors() else Brackets()
        self.streams = [
            TextStream(
                run.tokenizer,
                sys.stdout if self.single else StringIO(),
                prompt,
                terminal=self.terminal,
                marks=self.marks,
            )
            for prompt in (prompts if cfg.output == "text" else ())
        ]
        self._finished: dict[int, Generation] = {}  # by number of the prompt
        self._n_shown = 0

    def add(self, i: int, fresh: Fresh) -> None:
        self.streams[i].add(fresh)

    def end(self, i: int, generation: Generation) -> None:
        """Take the end of text ``i``, and print all texts that no unfinished one precedes."""
        self._finished[i] = generation
        while (text := self._finished.get(self._n_shown)) is not None:
            if self.streams:
                stream = self.streams[self._n_shown]
                stream.end(text)
                if isinstance(stream.out, StringIO):
                    print(stream.out.getvalue())
            else:
                print(json.dumps(_reported(text, drafts=self.cfg.show_drafts)))
            self._n_shown += 1

    def break_off(self) -> None:
        """Let an error message begin on its own line."""
        if self.single and self.streams and self.streams[0].begun:
            self.streams[0].write("\n")

    def remark(self, texts: Sequence[Generation], seconds: float) -> None:
        """Print remarks about all texts to standard error."""
        lines: list[str | None] = []
        deepest = max(len(texts[0].drafts_reached), self.cfg.lookup)
        if self.marks is not None and self.streams and deepest:
            lines.append(self.marks.legend(deepest, lookups=self.cfg.lookup > 0))
        if not self.single:
            lines.append(job_line(texts, seconds))
        elif self.streams:
            lines.append(ends_at_once(texts[0]))
            lines.append(cost_line(texts[0]) if self.terminal else None)
        for line in filter(None, lines):
            print(line, file=sys.stderr)


def checked_prompts(cfg: Any) -> list[str]:
    """Check the options of ``conf/generate.yaml`` before its model is read; return the prompts."""
    DecodingOptions.from_config(cfg)
    if cfg.show_drafts and not (cfg.speculative or cfg.lookup):
        raise not_together("show_drafts=true", "speculative=false")
    for name in ("top_k", "top_p"):
        if cfg[name] is not None and cfg.temperature == 0:
            raise UserError(
                f"{name}={cfg[name]} chooses among samples, and temperature=0 draws none: set "
                f"temperature=1, or leave {name} out."
            )
    return read_prompts(cfg.prompt, cfg.prompts, sys.stdin)


def _reported(generation: Generation, *, drafts: bool) -> dict[str, Any]:
    """The JSON object of a generated text."""
    values = {name: getattr(generation, name) for name in _REPORTED}
    if drafts:
        values["accepted_mask"] = generation.accepted_mask
        values["lookup_mask"] = generation.lookup_mask
        values["rejected"] = [draft._asdict() for draft in generation.rejected]
    return values


def job_line(generations: Sequence[Generation], seconds: float) -> str:
    """One line about several prompts: total tokens, time, tokens per second, tokens per pass."""
    tokens = sum(generation.new_tokens for generation in generations)
    line = f"{counted(len(generations), 'prompt')}, {counted(tokens, 'new token')}"
    line += f" in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.0f} tokens/s"
    per_step = rates(generations).get("tokens_per_step", 1.0)
    return f"{line}, {per_step:.2f} per pass" if per_step > 1 else line


def open_from_config(cfg: Any) -> OpenedModel:
    """Open the model of ``conf/generate.yaml`` on its device and in its precision.

    Raises:
        UserError: the checkpoint is damaged or foreign, or the precision is not available.
        OSError: a file is missing.
    """
    check_precision(
        cfg.precision, cfg.head_precision, activations=cfg.activations, compile=cfg.compile
    )
    set_threads(cfg.num_threads)
    options = {name: getattr(cfg, name) for name in ("allow", *_PRECISION, "compile")}
    return open_for_decoding(cfg.checkpoint, device=pick_accelerator(cfg.accelerator), **options)


def open_for_decoding(
    path: str | Path,
    *,
    device: str = "cpu",
    allow: Collection[str] = (),
    precision: str = "fp32",
    head_precision: str | None = None,
    activations: str = "fp32",
    compile: bool = False,
) -> OpenedModel:
    """Open a model that only decodes: a CPU stores its weights in packed form only, unless compiled
    programs decode (``compile``), which read a weight's own numbers.

    For the other arguments and the errors see :func:`~mtp_lightning.opening.open_model`, and
    ``packer_after_rounding`` and ``use_activations`` of ``decoding/precision.py``.
    """
    packs = device == "cpu" and not compile
    packer = packer_after_rounding(precision, head_precision) if packs else None
    run = open_model(path, device=device, allow=allow, packer_for=packer)
    if not packs:
        use_precision(run.model, precision, None if head_precision == AUTO else head_precision)
    use_activations(run.model, activations)
    return run


def continue_prompts(
    run: OpenedModel, prompts: Sequence[str], options: DecodingOptions, **callbacks: Any
) -> list[Generation]:
    """Continue prompts with the options of :func:`decoding_options`; the callbacks are those of
    :func:`~mtp_lightning.decoding.generate.generate`."""
    ids = [run.tokenizer.encode_prompt(prompt) for prompt in prompts]
    return generate(run.model, ids, options, tokenizer=run.tokenizer, **callbacks)


def decoding_options(cfg: Any, run: OpenedModel, *, rows: int | None = None) -> DecodingOptions:
    """The options of ``conf/generate.yaml`` or ``conf/serve.yaml``, with as many drafts as pay, of
    the tokens that the modules were trained on. ``rows`` is the number of texts that are mostly
    decoded together; a server gives None, which counts as one. An option out of range raises a
    :class:`UserError`."""
    defaults: dict[str, Any] = {"max_context": run.seq_len}
    drafts = cfg.speculative and run.model.mtp.max_draft_depth != 0
    if cfg.draft_vocab is None and drafts and not cfg.compile:
        defaults["draft_vocab"] = draft_vocab_of(run.run_config)
    options = DecodingOptions.from_config(cfg, **defaults)
    if cfg.get("show_drafts"):
        if not cfg.lookup:
            run.model.mtp.require_drafts()
        return options  # it also shows drafts that slow decoding down
    precision = {name: cfg[name] for name in _PRECISION}
    fastest = with_measured_depth(options, run, rows=min(options.slots, rows or 1), **precision)
    if rows is not None and (measured := fastest.measured) and not measured.pays:
        # Without the draft caches. A server (rows=None) keeps them: a request may set draft_depth.
        return options.plain(but_lookups=True)
    return fastest


def read_prompts(prompt: str | None, prompts: str | None, stdin: TextIO) -> list[str]:
    """Read the prompts from ``prompt``, from the lines of the file ``prompts`` or from ``stdin``.

    Raises:
        UserError: there is no prompt, it is given twice, or it is empty.
        OSError: ``prompts`` cannot be read.
    """
    if prompt is not None and prompts is not None:
        raise UserError(f"Give prompt= or prompts={prompts}, not both.")
    if prompt is not None:
        texts = [str(prompt)]
    elif prompts is not None:
        if prompts.lower().endswith(".jsonl"):
            from data_modules.sources.text import TextSource

            texts = list(TextSource(prompts, key="prompts").documents())
        else:
            lines = require_prompts(Path(prompts)).split("\n")  # not at \f
            texts = [line for line in lines if line]
    elif stdin.isatty():
        raise UserError("There is no prompt: give prompt=TEXT, prompts=FILE or standard input.")
    else:
        try:
            texts = [stdin.read().rstrip("\n")]
        except UnicodeDecodeError as error:
            raise UserError(f"Standard input is not UTF-8: {error}; convert it.") from error
        quote.require_utf8([f"prompt={texts[0]}"])
    if len(texts) > 1 and not all(texts):
        raise UserError(f"Text {texts.index('') + 1} of {prompts} is empty: remove it.")
    if not any(texts):
        raise UserError(f"{prompts or 'The prompt'} is empty: give prompt=TEXT or prompts=FILE.")
    return texts
