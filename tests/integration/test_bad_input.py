"""A wrong setting, text or checkpoint ends in one readable error line and exit code 1."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mtp_lightning.command_line.shell import readable_errors
from tests.integration.helpers import checkpoint, evaluated, fails, the_error, typed


def write(folder: Path, content: bytes | str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


TEXTS = {
    "not UTF-8": (b"ab\ncd" * 100 + b"\xff\xfe more", ["not UTF-8", "text.txt", "offset 500"]),
    # T + D + 1 = 16 + 2 + 1 tokens are the least that a window needs.
    "shorter than a window": (b"short text", ["19", "tokens"]),
    "only empty lines of JSON": (b"\n\n \n", ["no text"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_an_unusable_text_is_refused_and_leaves_no_folder(tmp_path, cache, capfd, case):
    content, expected = TEXTS[case]
    path = write(tmp_path, content, "text.jsonl" if "JSON" in case else "text.txt")
    run_dir = tmp_path / "run"
    error = fails(capfd, run_dir, cache, {"data": "text", "data.paths": path})
    for words in expected:
        assert words in error
    assert not run_dir.exists()


# Settings in addition to the quick run's => words of the error, separated by bars. A key without a
# value is left out. test_mistyped.py has the mistakes that the command line finds.
REFUSED = """\
mtp.depth=-1 => mtp.depth | -1
mtp.depth=17 => mtp.depth=17 | data.seq_len=16 | lengthen the window
model.n_heads=4 model.n_kv_heads=3 => n_heads | 4 | n_kv_heads | 3
model.d_model=33 => d_model | 33 | n_heads
model.d_model=36 model.n_heads=4 => model.d_head=9 (model.d_model / model.n_heads) must be even
mtp_lambda=[0.3,0.2,0.1] => mtp_lambda | 3 | 2
lambda_schedule=knots lambda_schedule.knots='{0:[1,2,3]}' => knots | 3
+trainer.no_such_key=1 => no_such_key
+optimizer.no_such_key=1 => no_such_key
+model.no_such_key=1 => no_such_key
trainer.precision=8-bit => precision | 8-bit | bf16-mixed
trainer.strategy=deepspeed => strategy | deepspeed | ddp
trainer.devices=0 => devices | 0
trainer.accelerator=tpu => accelerator | tpu | cpu
trainer.max_steps=0 => trainer.max_steps | 0
trainer.val_check_interval=0 => val_check_interval
trainer.gradient_clip_val=-1 => gradient_clip_val | -1
optimizer.lr=0 => optimizer.lr | 0
data.val_fraction=1.5 => data.val_fraction | 1.5
data.train_windows=3 => data.train_windows=3 is set | keep more windows
data.eval_bytes=0 => data.eval_bytes | at least 1, not 0
+trainer.limit_val_batches=3 => trainer.limit_val_batches=3 | data.eval_bytes
+trainer.limit_val_batches=1 => trainer.limit_val_batches=1 | data.eval_bytes
+trainer.fast_dev_run=true => trainer.limit_val_batches=1 | fast_dev_run
+trainer.enable_checkpointing=false => refuses | enable_checkpointing=False | leave it out
+trainer.barebones=true => refuses | barebones=True | leave it out
+trainer.benchmark=8 => trainer.benchmark must be true or false, not 8
+trainer.detect_anomaly=null => trainer.detect_anomaly must be true or false, not None
optimizer.schedule.kind=square => square | cosine
data.batch_size=64 trainer.accumulate_grad_batches=100 =>
    6400 | data.batch_size | accumulate_grad_batches
tokenizer=pretrained tokenizer.path=no/tokenizer.json => no/tokenizer.json
tokenizer=pretrained tokenizer.path='~no-such-name/x' => ~no-such-name/x does not exist
tokenizer=bpe tokenizer.vocab_size=7 => vocab_size | 7 | 257
tokenizer=bpe tokenizer.vocab_size=1000.5 => vocab_size | whole number | 1000.5
tokenizer._target_=tests.data_modules.test_encoding_pool.CustomTokenizer =>
    CustomTokenizer is not a tokenizer of this project | set tokenizer=pretrained
callbacks.checkpoints.keep_steps=100 => callbacks.checkpoints.keep_steps must be a list, not 100
callbacks.checkpoints.keep_steps=[0] => callbacks.checkpoints.keep_steps | at least 1, not 0
optimizer._target_=mtp_lightning.optim.lr_schedule.LRSchedule =>
    optimizer. | is not a key: | --help optimizer
optimizer._target_=my_ideas.Sophia => my_ideas | PYTHONPATH
+callbacks.mine._target_=builtins.dict => dict | Callback is needed
model.attention._target_=8 => model.attention cannot be built: Expected a callable target, got '8'
model._target_=math.pi => model cannot be built: Expected a callable target, got '3.14
optimizer=muon optimizer.lr optimizer.groups.rest.algorithm._partial_=abc =>
    optimizer.groups.rest.algorithm cannot be built: | _partial_ flag must be a bool
# values of another type
optimizer.schedule=null => optimizer.schedule must be a mapping, not None
optimizer=muon optimizer.lr optimizer.groups=null => optimizer.groups must be a mapping, not None
optimizer=muon optimizer.lr optimizer.groups.muon=8 => optimizer.groups.muon must be a mapping
optimizer.betas=0.9 => optimizer.betas must be a list, not 0.9
model.rope_scaling=yarn => model.rope_scaling must be a mapping, not 'yarn'
callbacks.nan_guard=8 => callbacks.nan_guard must be a mapping, not 8
+callbacks.mine=8 => callbacks.mine must be a mapping, not 8
+logger.mine=8 => logger.mine must be a mapping, not 8
balance=dwa balance.depth=8 => balance.depth=8 is not mtp.depth=2: leave it out
lambda_schedule.depth=1000000000 => lambda_schedule.depth=1000000000 is not mtp.depth=2: leave
compare.match=8 => compare.match=8 is unknown: choose one of none
compare.match=flops balance=gradnorm mtp.detach=trunk => balance=gradnorm | mtp.detach=trunk cuts
compare.match=flops balance=trunk_ratio objective=wtv => balance=trunk_ratio | objective=wtv needs
trainer.precision=16 => trainer.precision=16 is unknown: choose one of auto
allow=numpy => allow must be a list, not 'numpy'
data=self_generated data.chat_before=8 => data.chat_before must be a text, in quotes if
# sizes beyond any model of this project
mtp_lambda=1e200 => mtp_lambda must be a number of at least 0, not 1e+200, which is too large
lambda_schedule=geometric lambda_schedule.beta=1e200 => lambda_schedule.beta | 1e+200, which is too
model.rope_theta=1000000000000000000000000000000 => model.rope_theta | 0, which is too large
trainer.num_threads=1000000 => trainer.num_threads must be a whole number in [1, 1024], not 1000000
data.num_workers=1000000000 => data.num_workers=1,000,000,000 is too large: give at most 64
trainer.devices=1000000 => trainer.devices must be a whole number in [1, 1024], not 1000000
model.n_layers=1000000000 => model.n_layers
mtp.blocks=1000000000 => mtp.blocks=1,000,000,000 | make it smaller
mtp=linear mtp.rank=1000000000 => mtp.rank=1,000,000,000 | make it smaller
model.d_ff=1000000000000 => model.d_ff
+model.vocab_size=1000000000000 => model.vocab_size
model.rope_theta=nan => model.rope_theta
model.norm_eps=-1 => model.norm_eps
# heads
mtp.init=last_block => no trunk to begin from: set init_from, or leave
mtp=linear mtp.depth=3 mtp.stride=6 => mtp.depth=3 x mtp.stride=6
mtp=top mtp.depth=2 => mtp.depth must be 1 with mtp=top, not 2
mtp=top mtp.depth=1 mtp.lookahead=0 => mtp.lookahead must be a whole number of at least
mtp=top mtp.depth=1 mtp.detach=all => mtp.detach=all is unknown: choose one of none, trunk
mtp=registers mtp.depth=1 mtp.lookahead=40 => mtp.lookahead=40 is beyond the windows
mtp=teacherless mtp.depth => mtp=teacherless hides the answers from the model
mtp=registers mtp.depth=1 trainer.precision=bf16-true => set mtp=sequential mtp.freeze_trunk=true
mtp.detach=all callbacks=gradient_conflict => callbacks=gradient_conflict measures | mtp.detach=all
# objectives
objective=kl objective.temperature=0 => objective.temperature must be a number
data.seq_len=16 mtp.depth=16 objective=kl =>
    objective=kl compares depth 16 | data.seq_len=16 | predict fewer
data.seq_len=16 mtp.depth=8 mtp.stride=2 mtp=linear objective.confidence=true =>
    objective.confidence=true compares depth 8
objective=mix => objective.terms names no term
objective=mix objective.terms={cee:1} => has cee, which is unknown
objective=mix objective.terms={feature:1} => does not train what
mtp=top mtp.depth=1 objective=anchor => objective.terms={ce, anchor} is for depths that predict
objective=e2e_tv mtp.depth=0 => objective=e2e_tv has nothing to act on
objective.weights=exp_decay mtp.depth=0 => has nothing to act on at mtp.depth
objective.confidence=true mtp.depth=0 => confidence=true has nothing to act on
objective.tau=1 => read by objective.mask=entropy alone
objective=e2e_tv balance=gradnorm =>
    balance=gradnorm measures one depth after another, but objective=e2e_tv
objective=eal mtp.depth=2 balance=sampled_depths =>
    balance=sampled_depths leaves depths out of a step, but objective=eal
# tasks
STAR data.task.nodes=6 => data.task.nodes=6 | 7 nodes
STAR data.seq_len=3 => data.seq_len=3 | 25 tokens | 24
STAR data=mqar data.task.keys=7 => data.task.keys=7 | data.task.pairs=8 | raise data.task.keys
STAR data.document_mask=true => data.document_mask | leave it out
STAR +data.eval_bytes=9 => data.eval_bytes is a key of data= | leave it out
STAR mtp.depth=25 => mtp.depth | 24
STAR mtp=teacherless mtp.depth data.train_prompt=true => mtp=teacherless | data.train_prompt
STAR mtp=bag mtp.depth mtp.weights=idf => a task has no documents: set mtp.weights=none
callbacks=[stop_when_solved] => needs a task | no answers
STAR callbacks=[stop_when_solved] callbacks.stop_when_solved.level=1 => level must be | not 1
STAR callbacks=[stop_when_solved] callbacks.stop_when_solved.validations=0 => at least 1, not 0
# several processes
FSDP balance=gradnorm => balance=gradnorm takes every task's gradient by itself
FSDP callbacks=[default,gradient_conflict] => callbacks=gradient_conflict takes
FSDP trainer.shard_size=1 => trainer.shard_size
FSDP trainer.shard_size=2 trainer.strategy=ddp => has no meaning for | leave it null
FSDP trainer.split_checkpoint_gb=-1 => trainer.split_checkpoint_gb must be a number of at
FSDP trainer.strategy=auto => trainer.devices=2 needs | ddp (each has the whole model) or fsdp
FSDP trainer.num_nodes=2 => nothing says where the other machines are
"""
STAR = "data=star_graph data.seq_len data.val_fraction data.eval_bytes tokenizer"
FSDP = "trainer.devices=2 trainer.strategy=fsdp"
ROWS = [row for row in re.sub("=>\n +", "=> ", REFUSED).splitlines() if not row.startswith("#")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition(" => ")[0])
def test_a_wrong_setting_is_refused_and_leaves_no_folder(tmp_path, cache, capfd, row):
    overrides, _, expected = row.partition(" => ")
    settings = typed(overrides.replace("STAR", STAR).replace("FSDP", FSDP))
    error = fails(capfd, tmp_path / "run", cache, settings)
    for words in expected.split(" | "):
        assert words in error
    assert not (tmp_path / "run").exists()


def test_evaluate_refuses_unusable_checkpoints(tmp_path, finished, capfd):
    def refused(path: Path) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, readable_errors():
            evaluated(path)
        assert ended.value.code == 1
        return the_error(capfd.readouterr().err)

    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")
    assert "no intact checkpoint: give" in refused(tmp_path)
    (tmp_path / "sweep" / "job" / "checkpoints").mkdir(parents=True)
    assert f"did you mean {tmp_path / 'sweep' / 'job'}?" in refused(tmp_path / "sweep")
    assert "damaged" in refused(write(tmp_path, "no checkpoint at all", "text.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "model_config" in refused(tmp_path / "other.ckpt")
    torch.save({"code": Path("/")}, tmp_path / "code.ckpt")
    assert "not loaded" in refused(tmp_path / "code.ckpt").replace("\n", " ")
    content = checkpoint(finished)
    content["state_dict"].pop("model.trunk.norm.weight")
    content["state_dict"]["model.extra"] = torch.zeros(1)
    torch.save(content, tmp_path / "part.ckpt")
    error = refused(tmp_path / "part.ckpt")
    assert "trunk.norm.weight is missing" in error and "extra is unknown" in error
    content = checkpoint(finished)
    content["config"]["data"]["source"]["_target_"] = "os.system"
    torch.save(content, tmp_path / "foreign.ckpt")
    assert "os.system is refused" in refused(tmp_path / "foreign.ckpt")
