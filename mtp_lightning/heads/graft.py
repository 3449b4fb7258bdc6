"""``mtp-lightning doctor graft BASE TUNED``: a base's MTP layers on a tuned copy of its trunk.

Fine-tuning usually loses the MTP layers or leaves them unchanged. They still draft on the tuned
trunk, but less well the more its weights have changed. So their agreement with the trunk is
measured on the tuned model's own text, with the base's trunk and with the tuned one. If it fell,
the phases of ``mtp-lightning heads`` train the layers further. The exporter writes and checks the
result.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.heads.phases import (
    EXPORT,
    add_options,
    make_plan,
    output_of,
    require_inputs,
    run_export,
    run_training,
    say,
)
from mtp_lightning.interop.agreement import (
    ABOVE,
    Agreement,
    agreement_of_depths,
    own_texts,
    prompts_of,
)
from mtp_lightning.interop.writing import write_folder
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.opening import OpenedModel, draft_vocab_of, open_model, read_model
from mtp_lightning.run.config import describe_differences
from mtp_lightning.run.folder import claimed
from mtp_lightning.settings import require_number
from mtp_lightning.weights import StoredModel, require_fitting

GRAFTED = "grafted"
# Settings of the trunk that decide how a module's weights are read, whatever their shapes.
_FIXED = ("n_heads:", "n_kv_heads:", "d_head:", "attention.", "feed_forward.")


def main(argv: list[str], *, program: str) -> None:
    """The command."""
    parser = Parser(
        prog=program,
        description="Put the MTP layers of a base model on a tuned copy of its trunk.",
        epilog="exit code: 0 written, 1 not",
    )
    parser.add_argument("base", type=Path, help="the model that has MTP layers")
    parser.add_argument("tuned", type=Path, help="the model that gets them, with its own trunk")
    add_options(parser, output="TUNED_graft", hours="hours of further training, if needed (1)")
    parser.add_argument(
        "--new-tokens", type=int, default=256, help="tokens of each of four test texts (256)"
    )
    args = parser.parse_intermixed_args(argv)
    with readable_errors():
        require_inputs(args, args.base, args.tuned)
        require_number("--hours", args.hours, least=0)
        unused = " ".join([*args.overrides, *(["--text"] if args.text else [])])
        if unused and not args.hours:
            raise UserError(f"--hours=0 trains nothing: leave out {unused}, or give hours.")
        if args.new_tokens < 8:
            raise UserError(f"--new-tokens={args.new_tokens} is too few to test: give 8 or more.")
        output = output_of(args, "graft", args.tuned, args.base)
        if (output / EXPORT).exists():
            raise UserError(f"{output / EXPORT} exists: choose another --output or remove it.")
        with claimed(output, option="--output", seconds=0):
            _run(args, output)


def _run(args: Any, output: Path) -> None:
    base, tuned = read_model(args.base), open_model(args.tuned)
    model = grafted(base, tuned)
    n_tensors = len(_modules(base.weights))
    say("layers", f"{n_tensors} tensors of {args.base}, of the names and shapes needed")
    for line in differences(base.config, model.config):
        say("differs", line)
    prompts = prompts_of(model, tuned.tokenizer)
    max_new = max(8, tuned.seq_len - max(map(len, prompts)))
    texts = own_texts(model, prompts, min(args.new_tokens, max_new))
    draft_vocab = draft_vocab_of(base.run_config)
    agreement = agreement_of_depths(model, texts, draft_vocab)
    say("agreement", f"{_shares(agreement)} with the tuned trunk, on its own texts")
    needs_training = True
    if max(int(text.max()) for text in texts) < base.config.trunk.vocab_size:
        before = agreement_of_depths(base.build(), texts, draft_vocab)
        say("", f"{_shares(before)} with the base's trunk, on the same texts")
        needs_training = agreement.fell_from(before)
    say("", f"{agreement.constant:.1%} the same token everywhere")
    folder = output / GRAFTED
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier start
    write_folder(
        folder,
        model,
        tuned.tokenizer,
        dtype="float32",
        max_positions=tuned.seq_len,
        shard_bytes=5 * 10**9,
        draft_vocab=draft_vocab,
    )
    checkpoint = folder
    if needs_training and args.hours:
        checkpoint, agreement = _trained_on(folder, output, args, texts, agreement)
    elif needs_training:
        say("", "--hours=0 leaves the layers as they are")
    if agreement.shares[1] <= agreement.constant + ABOVE:
        raise UserError(
            f"the layers of {args.base} do not agree with the trunk of {args.tuned} "
            f"({agreement.shares[1]:.1%}; {agreement.constant:.1%} with one token everywhere): "
            "nothing is exported; give more --hours and another --output, or try mtp-lightning "
            "heads."
        )
    run_export(checkpoint, output, tuned.seq_len)
    say("written to", str(output / EXPORT))


def _trained_on(
    folder: Path, output: Path, args: Any, texts: list[Tensor], before: Agreement[int]
) -> tuple[Path, Agreement[int]]:
    """Train the layers on, and choose the better of before and after."""
    plan = make_plan(folder, output, args, [args.base, args.tuned], keep=True, further=True)
    run = run_training(plan, output)
    trained = open_model(run)
    after = agreement_of_depths(trained.model, texts, draft_vocab_of(trained.run_config))
    say("agreement", f"{_shares(after)} after training on")
    if after.shares[1] <= before.shares[1]:
        say("", "training on did not help: the layers stay as they were")
        return folder, before
    return run, after


def grafted(base: StoredModel, tuned: OpenedModel) -> MTPModel:
    """The tuned trunk with the base's MTP layers.

    Raises:
        UserError: the base has none, or theirs do not have the names and shapes that they need.
    """
    if not base.config.mtp.depth or not base.config.mtp.predicts_tokens:
        raise UserError(f"{base.path} has no MTP layers to graft: give the model that has them.")
    config = ModelConfig(trunk=tuned.model.config.trunk, mtp=base.config.mtp)
    model = config.on_meta()
    if reason := model.mtp.draft_obstacle():
        raise UserError(f"The layers of {base.path} cannot draft: {reason}")
    shapes = {name: x.shape for name, x in _modules(model.state_dict()).items()}
    modules = _modules(base.weights)
    message = f"The layers of {base.path} do not fit the trunk of {tuned.path}"
    require_fitting(shapes, modules, message=message)
    fixed = [line for line in differences(base.config, config) if line.startswith(_FIXED)]
    if fixed:
        raise UserError(f"{message}: {'; '.join(fixed)}.")
    trunk = {n: x for n, x in tuned.model.state_dict().items() if not n.startswith("mtp.")}
    return replace(base, config=config, weights={**trunk, **modules}).build()


def _shares(agreement: Agreement[int]) -> str:
    return ", ".join(f"{share:.1%} at depth {k}" for k, share in agreement.shares.items())


def _modules(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the modules."""
    return {name: weight for name, weight in weights.items() if name.startswith("mtp.")}


def differences(base: ModelConfig, tuned: ModelConfig) -> list[str]:
    """Settings in which the two trunks differ, besides those of their training."""
    free = [*base.trunk.training_keys, *tuned.trunk.training_keys, "init_std"]
    return describe_differences(base.trunk.to_dict(), tuned.trunk.to_dict(), ignore=free)
