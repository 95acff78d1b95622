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
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1
    assert "amount" in wrong.stderr
