"""The laboratory: comparisons that survive being killed, counted operations, tests in words."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sprout_lab.cli import main
from sprout_lab.configs import ConfigError
from sprout_lab.families import families
from sprout_lab.laboratory.comparison import (
    Comparison, ComparisonConfig, contestants, outcomes, train_all)
from sprout_lab.laboratory.compute import training_flops
from sprout_lab.laboratory.report import summarize, write_report

QUICK = dict(amount=3e9, seeds=2, rates=2, sequence_length=32, batch_size=4, evaluations=2,
             final_eval_batches=2, beside=False, device="cpu")
CAUSAL = [name for name, family in families.items() if "causal" in family.objectives]


def compare(folder, *names, **settings):
    config = ComparisonConfig(families=list(names), **{**QUICK, "output_dir": str(folder),
                                                       **settings})
    comparison = Comparison(config, log=lambda words: None)
    train_all(comparison)
    return comparison


@pytest.mark.parametrize("name", CAUSAL)
def test_flops_equal_torch_counter_where_it_sees_everything(name):
    "With attention spelled out as products, torch's own counter misses nothing."
    model = families[name].build(objective="causal", vocab_size=259)
    ids = torch.randint(250, (2, 48), generator=torch.Generator().manual_seed(1))
    batch = dict(input_ids=ids, labels=ids)
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(**batch).loss.backward()
    model.zero_grad()
    torch.manual_seed(0)
    ours, theirs = training_flops(model, batch), counter.get_total_flops()
    # the kernel's backward pass computes the scores once more than kept scores would need
    assert theirs <= ours < 1.03 * theirs


def test_flops_of_attention_are_not_lost():
    model = families["transformer"].build(vocab_size=259)
    ids = torch.zeros(1, 256, dtype=torch.long)
    with FlopCounterMode(display=False) as counter: model(input_ids=ids, labels=ids).loss.backward()
    config = model.config
    scores = 2 * 256 * 256 * config.hidden_size * config.num_hidden_layers   # one product
    missing = training_flops(model, dict(input_ids=ids, labels=ids)) - counter.get_total_flops()
    assert missing == 7 * scores


def test_counting_leaves_model_and_random_numbers_alone():
    model = families["sprout"].build(objective="causal", vocab_size=259)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, usage = torch.get_rng_state(), model.tree.usage()
    ids = torch.ones(2, 16, dtype=torch.long)
    training_flops(model, dict(input_ids=ids, labels=ids))
    assert torch.equal(torch.get_rng_state(), state) and model.tree.usage() == usage
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_one_more_family_and_one_more_seed_train_only_what_is_new(tmp_path):
    compare(tmp_path, "sprout", seeds=1)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("outcome.json")}
    compare(tmp_path, "transformer", "sprout", seeds=2)
    now = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("outcome.json")}
    assert len(times) == 3 and len(now) == 8
    assert all(now[p] == then for p, then in times.items())


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    Comparison(ComparisonConfig(output_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="holds a comparison with budget=flops, not tokens"):
        Comparison(ComparisonConfig(output_dir=str(tmp_path), budget="tokens"))


def test_objectives_are_never_mixed(tmp_path):
    comparison = compare(tmp_path, "sprout", "transformer", seeds=1, rates=1, beside=True)
    summary = summarize(comparison)
    assert [r["objective"] for r in summary["results"]] == ["causal", "causal", "masked"]
    names = {name for d in summary["differences"]["causal"] for name in (d["one"], d["other"])}
    assert names == {"sprout", "transformer"} and summary["differences"]["masked"] == []
    page = write_report(comparison, pictures=False).read_text()
    assert "masked models, on their own scale" in page and "nat" in page


def test_a_mix_of_corpora_is_read_by_every_run(tmp_path):
    comparison = compare(tmp_path, "sprout", seeds=1, rates=1, dataset="shakespeare+tales")
    config = (Path(outcomes(comparison)[0]["folder"]) / "config.yaml").read_text()
    assert "shakespeare+tales.train.jsonl" in config
    assert all(o["score"] < 8 for o in outcomes(comparison))


def test_a_rate_that_diverges_is_said_and_not_taken(tmp_path, monkeypatch):
    from sprout_lab.laboratory import comparison as module
    monkeypatch.setattr(module, "rates_around", lambda rate, count: [0.01, 10.0])
    found = compare(tmp_path, "transformer", seeds=1)
    trials = {o["rate"]: o for o in outcomes(found, trials=True)}
    assert found.rate(contestants(found.config)[0]) == 0.01
    assert trials[10.0]["score"] is None or trials[10.0]["score"] > trials[0.01]["score"]


def command(folder, *names, **settings):
    flags = {**{k: v for k, v in QUICK.items() if k not in ("beside", "device")},
             "output_dir": folder, **settings}
    code = "from sprout_lab.cli import main; main()"
    words = [str(w) for name, value in flags.items() for w in (f"--{name}", value)]
    return [sys.executable, "-c", code, "compare", *(names or ["sprout"]), "--no_beside",
            "--no_pictures", "--device", "cpu", *words]


def table(folder) -> dict:
    found = json.loads((Path(folder) / "results.json").read_text())
    found.pop("measured")
    return found


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_finished_its_tables_are_equal(tmp_path, kills):
    "Slow with ten kills: each costs the start of Python and torch."
    env, few = {**os.environ, "OMP_NUM_THREADS": "1"}, kills < 5
    names = ["sprout"] if few else ["transformer", "sprout"]
    settings = dict(amount=1.5e10 if few else 6e10, rates=1 if few else 2)
    whole, parts = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, *names, **settings), check=True, env=env, capture_output=True)
    chance, killed = random.Random(7), 0
    for attempt in range(4 * kills):
        before = len(list(parts.rglob("step_*")))
        process = subprocess.Popen(command(parts, *names, **settings), env=env,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while killed < kills and process.poll() is None:   # until it has got somewhere
            if len(list(parts.rglob("step_*"))) != before:
                time.sleep(chance.uniform(0, 1.5 if few else 4))
                process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
                killed += 1
                break
            time.sleep(0.02)
        errors = process.communicate()[1]
        if process.returncode == 0: break
        assert process.returncode in (-signal.SIGKILL, 130), errors
    assert killed >= 2 and table(parts) == table(whole)


def test_the_command_ends_with_the_report(tmp_path):
    done = subprocess.run(command(tmp_path, seeds=1, rates=1), capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last == f"report: {tmp_path / 'report.html'}" and (tmp_path / "report.html").exists()
    wrong = subprocess.run(command(tmp_path, seeds=1, rates=1, amount="-1"), capture_output=True,
                           text=True)
    *loading, mistake = wrong.stderr.strip().splitlines()
    assert wrong.returncode == 2 and mistake.startswith("sprout-lab: ") and "amount" in mistake
    assert loading == ["loading PyTorch and the models …"]


SWEEP = ["sweep", "transformer", "--set", "learning_rate=0.002..0.05", "--set", "hidden_size=32,64",
         "--set", "sequence_length=32", "--set", "batch_size=4", "--set", "num_hidden_layers=1",
         "--set", "num_attention_heads=2", "--max_steps", "12", "--evaluations", "4"]


def sprout_lab(*words, timeout=None):
    code = "from sprout_lab.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True,
                          text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_sweep_killed_in_the_middle_goes_on(tmp_path):
    from sprout_lab.laboratory.sweep import Sweep, SweepConfig, open_study, run_sweep
    values = SWEEP[3::2][:6]
    settings = dict(set=values, max_steps=12, evaluations=4, method="grid", grid_points=2,
                    prune=False)
    whole = run_sweep(Sweep("transformer", SweepConfig(
        **settings, output_dir=str(tmp_path / "whole")), log=lambda words: None))
    code = "from sprout_lab.cli import main; main()"
    words = [*SWEEP, "--method", "grid", "--grid_points", "2", "--no_prune", "--output_dir",
             tmp_path / "killed"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list((tmp_path / "killed").rglob("trial-1/**/step_*")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    sweep = Sweep("transformer", SweepConfig(**settings, output_dir=str(tmp_path / "killed")),
                  log=lambda words: None)
    running = [t for t in open_study(sweep).get_trials() if t.state.name == "RUNNING"]
    after = run_sweep(sweep)
    assert len(running) <= 1 and len(whole) == len(after) == 4
    scores = [[(json.dumps(r["values"], sort_keys=True), r["score"]) for r in rows]
              for rows in (whole, after)]
    assert sorted(scores[0]) == sorted(scores[1])


@pytest.mark.slow
def test_two_processes_share_a_sweep(tmp_path):
    "Slow: three starts of Python and torch."
    done = sprout_lab(*SWEEP, "--trials", 5, "--processes", 2, "--output_dir", tmp_path, "--quiet")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 5 and (tmp_path / "sweep.png").exists()
    assert {r["state"] for r in rows} <= {"complete", "pruned"}
    assert len({json.dumps(r["values"]) for r in rows}) == 5


def test_a_trial_that_cannot_be_is_told_and_the_sweep_goes_on(tmp_path):
    from sprout_lab.laboratory.sweep import Sweep, SweepConfig, run_sweep
    values = ["num_attention_heads=2,3", "hidden_size=32", "num_hidden_layers=1",
              "sequence_length=32", "batch_size=4"]
    rows = run_sweep(Sweep("transformer", SweepConfig(
        set=values, method="grid", max_steps=4, evaluations=2, output_dir=str(tmp_path)),
        log=lambda words: None))
    states = {r["values"]["num_attention_heads"]: r for r in rows}
    assert states[2]["state"] == "complete" and states[3]["state"] == "fail"
    assert "num_attention_heads" in states[3]["reason"]


@pytest.mark.slow
def test_ray_tune_does_the_same_sweep(tmp_path):
    "Slow: Ray takes half a minute to start its processes."
    pytest.importorskip("ray")
    done = sprout_lab(*SWEEP, "--trials", 3, "--engine", "ray", "--output_dir", tmp_path, "--quiet")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 3 and any(r["state"] == "complete" for r in rows)


def test_a_prediction_stands_before_it_is_checked(tmp_path):
    from sprout_lab.laboratory.scaling import ScalingConfig, climb, predict, run_scaling
    config = ScalingConfig(families=["sprout"], amount=2e9, rungs=3, seeds=1, device="cpu",
                           sequence_length=32, batch_size=4, final_eval_batches=2,
                           output_dir=str(tmp_path))
    for rung in range(2): climb(config, rung, log=lambda words: None)
    told = predict(config)
    assert not list(tmp_path.glob("rung-2-*"))   # nothing of the last rung has been run
    rows = run_scaling(config, log=lambda words: None)
    assert predict(config) == told and rows[0]["predicted"] == told["sprout"]["loss"]


def test_a_worse_result_fails_the_records(tmp_path, capsys):
    new = {"plan": {"size": "nano", "dataset": "x"}, "results": [
        {"name": "slm", "mean": 2.5, "spread": 0.01, "scores": [2.49, 2.51]}]}
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "a.json").write_text(json.dumps(new))
    new["results"][0] |= {"mean": 2.6, "scores": [2.59, 2.61]}
    (tmp_path / "new.json").write_text(json.dumps(new))
    with pytest.raises(SystemExit) as ended:
        main(["records", str(tmp_path / "new.json"), "--studies", str(tmp_path / "studies")])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "is worse than the recorded 2.5000" in shown.out
    assert len(shown.err.strip().splitlines()) == 1
