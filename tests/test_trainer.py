"""The trainer under stress: two processes, damage, full disks, signals, budgets, trackers."""
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sprout_lab.configs import ConfigError
from sprout_lab.data.prepare import load_data
from sprout_lab.configs import DataConfig
from sprout_lab.families import configure, load_model, make_trainer
from sprout_lab.runs import Run, checkpoint_facts, damage, find_checkpoint, read_log
from sprout_lab.trainers.callbacks import Callback

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "sequence_length": 32, "batch_size": 4,
        "max_steps": 20, "save_interval": 5, "eval_interval": 10, "eval_batches": 2,
        "log_interval": 2, "warmup_steps": 4, "tensorboard": False, "sample_tokens": 0,
        "device": "cpu", "final_eval_batches": 2}


@pytest.fixture(scope="session")
def data(): return load_data(DataConfig(sequence_length=32))


def trainer(folder, data=None, extra=(), said=None, **flags):
    said = [] if said is None else said
    run = configure("transformer", {**TINY, "output_dir": str(folder), **flags}, log=said.append)
    return make_trainer(run, data=data, extra_callbacks=extra, log=said.append)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_run_folder_is_whole(tmp_path, data):
    run = trainer(tmp_path / "run", data, tensorboard=True, sample_tokens=20).train()
    for path in (run.config, run.training_log, run.eval_log, run.evaluation, run.generations,
                 run.summary, run.results / "bits_per_byte.png",
                 run.checkpoints / "best" / "model.safetensors",
                 run.checkpoints / "latest" / "optimizer.safetensors"):
        assert path.exists(), path
    assert list(run.tensorboard.glob("events.*"))
    facts = checkpoint_facts(run.checkpoints / "step_20.pt")
    assert facts["step"] == 20 and facts["model_info"]["family"] == "transformer"
    assert facts["loss"] > 0 and 0 <= facts["accuracy"] <= 1
    assert json.loads(run.summary.read_text())["state"] == "finished"
    log = read_log(run.training_log)
    assert log["step"] == list(range(2, 21, 2)) and all(math.isfinite(v) for v in log["loss"])
    assert read_log(run.eval_log)["step"] == [0, 10, 20]
    assert not [p for p in run.folder.rglob("*")
                if p.suffix in (".pkl", ".pt", ".pth")], "nothing is pickled"


@pytest.mark.parametrize("flags",
                         [{}, {"optimizer": "muon", "dropout": 0.1},
                          {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
                          {"order": "shuffle", "gradient_checkpointing": True},
                                   {"num_epochs": 0.003, "scheduler": "wsd"}])
def test_resumed_equals_whole(tmp_path, data, flags):
    whole = trainer(tmp_path / "whole", data, **flags)
    whole.train()

    class StopAt(Callback):
        def on_step(self, t): t.step == 7 and t.stop("enough for now")
    first = trainer(tmp_path / "parts", data, [StopAt()], **flags)
    first.train()
    assert first.step == 7 and Run(tmp_path / "parts").steps()[-1] == 7
    second = trainer(tmp_path / "parts", data, resume_from="auto", **flags)
    second.train()
    assert torch.equal(weights(whole.model), weights(second.model))
    one, two = read_log(whole.run.training_log), read_log(second.run.training_log)
    for column in ("step", "loss", "learning_rate", "grad_norm", "tokens"):
        assert one[column] == two[column], column


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_schedule_reaches_the_weights(tmp_path, data, optimizer):
    t = trainer(tmp_path / "run", data, optimizer=optimizer, learning_rate=0.01,
                min_learning_rate=0.0, scheduler="linear", weight_decay=0)
    t.train()
    parts = getattr(t.optimizer, "parts", [t.optimizer])
    # the last of 16 steps of decay
    assert {round(g["lr"], 9) for part in parts
            for g in part.param_groups} == {round(0.01 * 1 / 16, 9)}


def test_retention_keeps_best_and_latest(tmp_path, data):
    run = trainer(tmp_path / "run", data, max_steps=40, save_interval=4, keep_checkpoints=2,
                  eval_interval=8).train()
    steps = run.steps()
    best, latest = (int((run.checkpoints / n).resolve().name.split("_")[1])
                    for n in ("best", "latest"))
    assert latest == 40 and best in steps and len(steps) <= 3 and 36 in steps


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "pickle"])
def test_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, data, harm):
    run = trainer(tmp_path / "run", data, keep_checkpoints=10).train()
    file = run.step_folder(20) / "model.safetensors"
    content = file.read_bytes()
    if harm == "truncate": file.write_bytes(content[:-100])
    elif harm == "flip": file.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif harm == "remove": file.unlink()
    else: file.write_bytes(pickle.dumps({"a": 1}))
    said = []
    again = trainer(tmp_path / "run", data, said=said, resume_from="auto", max_steps=25)
    assert again.step == 15 and any("damaged" in line and "model.safetensors" in line
                                    for line in said) and any("step_15" in line for line in said)
    again.train()
    assert damage(run.step_folder(25)) is None
    said = []
    model, _ = load_model(run.step_folder(25), log=said.append)
    assert not said


def test_a_pickle_is_refused(tmp_path, data):
    (tmp_path / "step_5.pt").write_bytes(pickle.dumps({"weights": [1]}))
    with pytest.raises(ConfigError, match="nothing is ever unpickled"):
        find_checkpoint(tmp_path / "step_5.pt")
    run = trainer(tmp_path / "run", data).train()
    for file in (tmp_path / "plain").rglob("*"): file.unlink()
    shutil.copytree(run.checkpoints / "best", tmp_path / "plain")
    (tmp_path / "plain" / "manifest.json").unlink()
    (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "plain" / "pytorch_model.bin")
    with pytest.raises(ConfigError): load_model(tmp_path / "plain")


def test_resuming_an_earlier_step_does_not_overwrite_the_later_ones(tmp_path, data):
    run = trainer(tmp_path / "run", data, keep_checkpoints=10).train()
    before = sorted(p.name for p in run.checkpoints.iterdir())
    said = []
    fork = trainer(tmp_path / "run", data, said=said,
                   resume_from=str(run.folder / "checkpoints" / "step_10.pt"))
    fork.train()
    assert fork.run.folder != run.folder
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before
    assert any("continued in" in line for line in said)


def test_a_run_is_not_overwritten(tmp_path, data):
    trainer(tmp_path / "run", data).train()
    with pytest.raises(ConfigError, match="already holds a run"): trainer(tmp_path / "run", data)
    with trainer(tmp_path / "other", data).run.lock():
        with pytest.raises(ConfigError, match="another process"):
            code = (f"from sprout_lab.runs import Run\nwith "
                    f"Run({str(tmp_path / 'other')!r}).lock(): pass")
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            raise ConfigError(out.stderr.strip().splitlines()[-1])


class Poison(Callback):
    "Makes the weights not finite, once, right after a step."
    def __init__(self, at): self.at = at
    def on_step(self, t):
        if t.step == self.at and t.rollbacks == 0:
            with torch.no_grad(): next(t.model.parameters()).fill_(float("nan"))


def test_nan_guard_rolls_back_and_goes_on(tmp_path, data):
    said = []
    t = trainer(tmp_path / "run", data, [Poison(7)], said)
    t.train()
    assert (t.step == 20 and t.rollbacks == 1 and t.lr_backoff == 0.5
            and torch.isfinite(weights(t.model)).all())
    assert any("back to step 5" in line for line in said)
    log = read_log(t.run.training_log)
    assert log["step"] == list(range(2, 21, 2)) and all(math.isfinite(v) for v in log["loss"])


def test_nan_guard_gives_up_in_one_line(tmp_path, data):
    class Always(Poison):
        def on_step(self, t):
            with torch.no_grad(): next(t.model.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match="after 2 rollbacks") as error:
        trainer(tmp_path / "run", data, [Always(0)], max_rollbacks=2).train()
    assert "\n" not in str(error.value)


def test_time_budget_early_stopping_and_stop(tmp_path, data):
    t = trainer(tmp_path / "budget", data, max_steps=100000, max_minutes=0.02)
    t.train()
    assert 0 < t.step < 100000 and "time budget" in t.stop_reason and t.run.steps()[-1] == t.step
    t = trainer(tmp_path / "early", data, learning_rate=1e-9, min_learning_rate=0, max_steps=500,
                eval_interval=2, early_stopping_patience=3, weight_decay=0)
    t.best = None
    t.train()
    assert t.step < 500 and "no better" in t.stop_reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_cleanly(tmp_path, number):
    folder = tmp_path / "run"
    flags = [word for k, v in {**TINY, "max_steps": 100000}.items()
             for word in ([f"--{k}", str(v)] if not isinstance(v, bool) else [f"--no_{k}"])]
    process = subprocess.Popen([str(Path(sys.executable).with_name("sprout-lab")), "train",
                                "transformer", *flags, "--output_dir", str(folder)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not read_log(folder / "logs/training_log.csv").get("step"):
        time.sleep(0.1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert f"stopped by {number.name}" in out and "Traceback" not in out
    assert damage(Run(folder).step_folder(Run(folder).steps()[-1])) is None


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, data):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
                      capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(ConfigError, match="could not be written.*No space") as error:
            trainer(disk / "run", data, keep_checkpoints=100, save_interval=1).train()
        assert "\n" not in str(error.value)
        run = Run(disk / "run")
        assert run.steps() and damage(run.step_folder(run.steps()[-1])) is None
        assert find_checkpoint(run.folder, prefer="latest",
                               log=pytest.fail).name == f"step_{run.steps()[-1]}"
    finally: subprocess.run(["umount", str(disk)], check=True)


def test_wandb_without_login_logs_offline(tmp_path, data, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    said = []
    run = trainer(tmp_path / "run", data, said=said, use_wandb=True, wandb_project="test").train()
    assert any("logging offline" in line for line in said)
    assert list((run.folder / "wandb").glob("offline-run-*"))
    assert json.loads(run.summary.read_text())["state"] == "finished"


WORKER = """
import json, sys
from sprout_lab.families import configure, make_trainer
flags = json.loads(sys.argv[1])
t = make_trainer(configure("transformer", flags, log=lambda words: None))
t.train()
"""


@pytest.mark.parametrize("flags", [{}, {"gradient_accumulation_steps": 2, "optimizer": "muon"}])
def test_two_processes_give_the_losses_of_one(tmp_path, data, flags):
    one = trainer(tmp_path / "one", data, **flags)
    one.train()
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    settings = json.dumps({**TINY, **flags, "output_dir": str(tmp_path / "two")})
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node", "2", str(script), settings], capture_output=True,
                         text=True, timeout=180,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    for name in ("training_log", "eval_log"):
        a, b = (read_log(getattr(run, name))["loss"] for run in (one.run, Run(tmp_path / "two")))
        assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < 2e-4, (a, b)


MEMORY = """
import sys, pathlib
from sprout_lab.families import configure, make_trainer
flags = {**eval(sys.argv[1]), "data_dir": sys.argv[2], "output_dir": sys.argv[3]}
t = make_trainer(configure("transformer", flags, log=lambda words: None), callbacks=[])
t.train()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")][0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_does_not_grow_with_the_data(tmp_path):
    """Anonymous memory after 300 steps on a 1 GB token file is within 200 MB of that on a 1 MB one
    (a sparse file: the bytes are zeros, the reading is real)."""
    from sprout_lab.data.tokens import TokenWriter
    from sprout_lab.data.tokenizers import ByteTokenizer, fingerprint
    import numpy as np
    script = tmp_path / "memory.py"
    script.write_text(MEMORY)
    used = []
    for size in (1_000_000, 1_000_000_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        tokenizer = ByteTokenizer()
        tokenizer.save_pretrained(folder / "tokenizer")
        block = np.frombuffer(b"To be, or not to be, that is the question.\n" * 25_000,
                              dtype=np.uint8)[:1_000_000]
        for name, count in (("train.bin", size // 1_000_000), ("val.bin", 1)):
            with TokenWriter(folder / name, len(tokenizer), fingerprint(tokenizer)) as writer:
                for _ in range(count): writer.write(block, num_bytes=len(block), num_documents=1)
        flags = {**TINY, "max_steps": 300}
        out = subprocess.run([sys.executable, str(script), repr(flags), str(folder),
                              str(tmp_path / f"run{size}")], capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert out.returncode == 0, out.stderr[-2000:]
        used.append(int(out.stdout.split()[-1]) / 1000)
        shutil.rmtree(folder)
    assert used[1] - used[0] < 200, used


def test_damaged_logs_are_named_and_put_back(tmp_path, data):
    "A curve must not be silently wrong after a resume."
    first = trainer(tmp_path / "run", data, max_steps=10)
    first.train()
    whole = {path.name: path.read_bytes() for path in first.run.logs.glob("*_log.csv")}
    assert set(whole) == {"training_log.csv", "eval_log.csv"}
    flip = lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:]
    harms = {"flipped": flip, "cut": lambda content: content[:-30], "emptied": lambda content: b"",
             "no text": lambda content: b"\xff" + content[1:], "deleted": None}
    for harm, change in harms.items():
        for name, content in whole.items():
            path = first.run.logs / name
            path.unlink() if change is None else path.write_bytes(change(content))
        said = []
        again = trainer(tmp_path / "run", data, said=said, resume_from="auto", max_steps=10)
        again.train()
        for name, content in whole.items():
            assert (first.run.logs / name).read_bytes() == content, (harm, name)
            assert any(name in line and "put back as it was at step_10" in line
                       for line in said), harm


@pytest.mark.parametrize("name", ["logs/training_log.csv", "logs/eval_log.csv", "config.yaml",
                                  "checkpoints/step_20/manifest.json",
                                  "checkpoints/step_20/model.safetensors",
                                  "checkpoints/step_20/trainer_state.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_one_line_and_no_wait(tmp_path, data, name, kind):
    run = trainer(tmp_path / "run", data, save_interval=10).train()
    (run.folder / name).unlink()
    (os.mkfifo if kind == "pipe" else os.mkdir)(run.folder / name)
    signal.alarm(60)   # a wait for ever ends the test
    said = []
    try: trainer(run.folder, data, said=said, resume_from="auto", max_steps=22).train()
    except ConfigError as error: said.append(str(error))
    finally: signal.alarm(0)
    assert any(Path(name).name in line for line in said) and not any("\n" in line for line in said)


def test_best_means_the_best_after_a_kill_between_the_links(tmp_path, data):
    run = trainer(tmp_path / "run", data, keep_checkpoints=10).train()
    best = (run.checkpoints / "best").resolve().name
    for name in ("best", "latest"): run.point(name, 5)   # the kill came before they were renewed
    (run.checkpoints / ".step_99.writing").mkdir()
    trainer(run.folder, data, resume_from="auto").train()
    assert (run.checkpoints / "best").resolve().name == best != "step_5"
    assert not list(run.checkpoints.glob(".*"))


def test_the_last_evaluation_is_bounded_or_left_out(tmp_path, data):
    one = trainer(tmp_path / "bounded", data, max_steps=4, final_eval_batches=3).train()
    assert json.loads(one.evaluation.read_text())["num_tokens"] == 3 * 4 * 32
    none = trainer(tmp_path / "none", data, max_steps=4, final_eval_batches=0).train()
    assert not none.evaluation.exists()


def test_wandb_goes_on_in_the_same_run(tmp_path, data, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = {"use_wandb": True, "wandb_project": "test", "resume_from": "auto"}
    run = trainer(tmp_path / "run", data, max_steps=10, **flags).train()
    trainer(tmp_path / "run", data, max_steps=20, **flags).train()
    names = [folder.name for folder in (run.folder / "wandb").glob("offline-run-*")]
    ids = {name.split("-")[3] for name in names}   # offline-run-TIME-ID, -1 behind it in one second
    assert ids == {(run.logs / "wandb_id.txt").read_text()}


BARE = """
import sys
for name in ("pydantic", "datasets", "ipywidgets", "seaborn"): sys.modules[name] = None
from sprout_lab.families import configure, make_trainer
make_trainer(configure("transformer", eval(sys.argv[1]), log=lambda words: None), log=lambda words: None).train()
"""


def test_training_needs_little_from_outside(tmp_path):
    flags = {**TINY, "max_steps": 2, "output_dir": str(tmp_path / "run")}
    out = subprocess.run([sys.executable, "-c", BARE, repr(flags)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]


@pytest.mark.parametrize("one, other", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_begins_anew_where_its_moments_do_not_fit(tmp_path, data, one, other):
    trainer(tmp_path / "run", data, optimizer=one, max_steps=10).train()
    said = []
    trainer(tmp_path / "run", data, said=said, optimizer=other, resume_from="auto").train()
    assert any(f"optimizer was {one!r} and is {other}" in line for line in said)
