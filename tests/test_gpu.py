"""The command for a GPU: its quick form on a CPU, and that a fault in one part stops no other."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sprout_lab.evaluation.benchmarks import Row, bench_rows, read_bench

root = Path(__file__).resolve().parent.parent
MACHINE = {"device": "a toy", "torch": torch.__version__}


@pytest.fixture(scope="module", autouse=True)
def tools():
    "tools/ can be imported from, as where the command is run."
    sys.path.insert(0, str(root / "tools"))
    yield
    sys.path.remove(str(root / "tools"))


def test_quick_form_walks_through_every_part(tmp_path):
    import gpu
    command = [sys.executable, "tools/gpu.py", "--device", "cpu", "--quick", "--output",
               str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-2000:]
    folder, = (tmp_path / "out").iterdir()
    assert folder.name.endswith("-quick"), "toy sizes stand beside no real measurement"
    assert {path.stem for path in folder.iterdir()} == set(gpu.LIMITS)
    for path in folder.iterdir():
        part = read_bench(path)["parts"][path.stem]
        assert part["state"] == "done" and part["rows"] and not part["faults"]
        assert part["quick"] and part["seconds"] < part["limit_s"]
        assert {"device", "python", "torch", "commit", "command"} <= set(part["machine"])
        for row in part["rows"]: assert Row.from_json(row).to_json() == row
    named = {part: [row.what for row in bench_rows(read_bench(folder / f"{part}.json"))]
             for part in gpu.LIMITS}
    assert sum("scan" in what for what in named["checks"]) == 8
    for family in ("transformer", "slm", "hnet", "sprout"):
        for part in ("training", "decoding", "enwik8"):
            assert any(what.startswith(family) for what in named[part]), (part, family)
    resumed = bench_rows(read_bench(folder / "resume.json"))[0]
    assert resumed.value == 0 and resumed.met and "killed after step" in resumed.note


def test_a_fault_in_one_part_is_named_and_stops_no_other(tmp_path, capsys):
    import gpu
    from gpu_parts.report import Settings
    row = Row("p", "w", "ours", "", "s", 1.0)

    def broken(report, settings):
        report.add(row)
        raise ValueError("a line\nand another")

    def partly(report, settings):
        with report.attempt("this"): raise RuntimeError("no")
        with report.attempt("that"): report.add(row)

    def slow(report, settings):
        report.add(row)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "child").write_text(str(child.pid))
        time.sleep(60)

    def greedy(report, settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def killed(report, settings): os.kill(os.getpid(), signal.SIGKILL)

    def fine(report, settings): report.add(row)

    settings = Settings(device="cpu", quick=True, output=tmp_path, limits={"slow": 1.0})
    parts = dict(broken=broken, partly=partly, slow=slow, greedy=greedy, killed=killed, fine=fine)
    reports = gpu.run_parts(parts, settings, MACHINE)
    faults = {name: report["faults"] for name, report in reports.items()}
    assert faults["broken"] == ["the whole part: ValueError: a line and another"]
    assert faults["partly"] == ["this: RuntimeError: no"] and len(reports["partly"]["rows"]) == 1
    assert faults["slow"] == ["the whole part: cut off after its limit of 1 s"]
    assert len(reports["slow"]["rows"]) == 1, "what was measured before the limit is kept"
    assert faults["greedy"][0].startswith("the whole part: out of memory: CUDA out of memory")
    assert "killed by signal 9" in faults["killed"][0]
    assert not faults["fine"] and reports["fine"]["state"] == "done"
    assert [report["state"] for report in reports.values()] == ["faults"] * 5 + ["done"]
    for name in parts:
        saved = json.loads((tmp_path / "a-toy-quick" / f"{name}.json").read_text())
        assert saved["parts"][name] == reports[name]
    child = int((tmp_path / "child").read_text())
    for _ in range(100):                                 # what a part started ends with it
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text(): break
        time.sleep(0.05)
    else: pytest.fail("the child of a part that was cut off is still running")
    gpu.tell(reports)
    shown = capsys.readouterr().out
    assert shown.count("FAULT") == 5 and "slow: FAULT: the whole part: cut off" in shown


def test_a_side_that_fails_leaves_the_race(tmp_path):
    from gpu_parts.report import Report, Settings, race
    report = Report(tmp_path / "r.json", "demo", MACHINE, True, 1.0)
    def fails(): raise torch.OutOfMemoryError("too large")
    seconds = race(report, {"ours": lambda: None, "theirs": fails},
                   Settings(device="cpu", quick=True))
    assert list(seconds) == ["ours"] and len(seconds["ours"]) == 1
    assert report.read().content["faults"] == ["theirs: out of memory: too large"]


def test_what_is_missing_is_said_at_once(monkeypatch, capsys):
    import gpu
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "a_package_that_is_nowhere"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert gpu.main(["--device", "cpu", "--quick"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("missing: a_package_that_is_nowhere;") and said.count("\n") == 1
    assert "--packages" in said and "--target" in said


def test_a_bare_machine_is_told_within_a_second():
    "`-IS`: Python without any package. A second of processor time, on whatever else is running."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run([sys.executable, "-IS", "tools/gpu.py"], cwd=root, capture_output=True,
                          text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert said.returncode == 2 and said.stderr.startswith("missing: torch, transformers")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1, spent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_can_be_done(tmp_path):
    shown = subprocess.run([sys.executable, "tools/gpu.py", "--output", str(tmp_path)], cwd=root,
                           capture_output=True, text=True)
    assert shown.returncode == 2 and "DEVICE=cpu QUICK=1" in shown.stderr
    assert "Traceback" not in shown.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, says",
                         [(["--only", "chekcs"], "chekcs"), (["--limit", "x=3"], "x=3"),
                          (["--peer", "nanogpt"], "NAME=VALUE")])
def test_mistakes_are_one_line(flags, says):
    shown = subprocess.run([sys.executable, "tools/gpu.py", "--device", "cpu", "--quick", *flags],
                           cwd=root, capture_output=True, text=True)
    assert shown.returncode and says in shown.stderr and shown.stderr.count("\n") == 1


def test_make_gpu_takes_the_machines_own_python():
    command = ["make", "--no-print-directory", "-n", "gpu", "DEVICE=cpu", "QUICK=1", "PYTHON=mine"]
    # `make test` runs this under a make of its own
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    shown = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.split()[:5] == ["mine", "tools/gpu.py", "--device", "cpu", "--quick"]
    assert ".venv" not in shown.stdout


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    from gpu_parts import enwik8
    from gpu_parts.report import Settings
    from sprout_lab.families import get_family
    settings = Settings(device="cpu", quick=True, runs=tmp_path)
    data, family = enwik8.prepared(settings), get_family("transformer")
    assert [len((data / f"{name}.bin").read_bytes()) > 900
            for name in enwik8.SPLITS] == [True] * 3
    stopped = enwik8.train(family, settings, data)
    final = max(stopped.steps())
    (stopped.step_folder(final) / "model.safetensors").unlink()   # the last save did not finish
    again = enwik8.train(family, settings, data)
    assert again.folder == stopped.folder and max(again.steps()) == final
    assert (again.step_folder(final) / "model.safetensors").exists()


def test_only_what_is_imported_is_asked_for():
    """The machines at hand have no pydantic, datasets, ipywidgets or seaborn; their absence stops
    nothing."""
    import gpu
    assert not {"pydantic", "datasets", "ipywidgets", "seaborn", "pandas"} & set(gpu.NEEDED)
    requirements = (root / "settings.ini").read_text()
    names = {"yaml": "pyyaml"}
    assert all(f"    {names.get(name, name)}>=" in requirements for name in gpu.NEEDED)


def test_an_embedded_corpus_trains_without_what_a_bare_machine_lacks(tmp_path):
    "Neither data sets, widgets nor figures' extras are needed to train and to evaluate."
    code = f'''
import sys
for name in ("pydantic", "datasets", "ipywidgets", "IPython", "seaborn", "pandas", "scipy", "tensorboard", "wandb",
             "lm_eval", "fastcore", "click"): sys.modules[name] = None
from sprout_lab.evaluation.evaluator import Evaluator
from sprout_lab.families import configure, make_trainer
shape = {{"hidden_size": 32, "num_hidden_layers": 1, "sequence_length": 32, "batch_size": 2}}
flags = {{**shape, "max_steps": 2, "eval_interval": 2, "eval_batches": 1, "tensorboard": False}}
trainer = make_trainer(configure("transformer", {{**flags, "output_dir": {str(tmp_path / "run")!r}}}))
trainer.train()
evaluator = Evaluator(trainer.model, trainer.data.tokenizer, {{"max_batches": 1}})
print(evaluator.evaluate(trainer.data.validation)["bits_per_byte"])
'''
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert 5 < float(shown.stdout.split()[-1]) < 12
