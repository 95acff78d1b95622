"""Sharded and tensor-parallel training: two processes give the losses and the checkpoints of one.
"""
import json
import os
import subprocess
import sys

import pytest
import torch

from sprout_lab.configs import ConfigError, DataConfig, TrainingConfig
from sprout_lab.data.prepare import load_data
from sprout_lab.families import configure, load_model, make_trainer
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM
from sprout_lab.runs import Run, damage, read_log
from sprout_lab.trainers.callbacks import Callback, Results, default_callbacks
from sprout_lab.trainers.parallel import check_parallel

TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "sequence_length": 32, "batch_size": 4,
        "max_steps": 16, "save_interval": 8, "eval_interval": 8, "eval_batches": 2,
        "log_interval": 2, "warmup_steps": 4, "tensorboard": False, "sample_tokens": 8,
        "device": "cpu", "optimizer": "adamw"}

# Runs one after the other in the same processes: starting torch is what costs time here.
WORKER = """
import json, sys, torch.distributed as dist
from sprout_lab.trainers.callbacks import Callback, Results, default_callbacks
from sprout_lab.configs import ConfigError
from sprout_lab.families import configure, make_trainer
for flags in json.loads(sys.argv[1]):
    poison = flags.pop("poison", None)
    stop = flags.pop("stop", None)
    results = flags.pop("results", False)   # evaluates all of the held-out text, which takes seconds
    class Extra(Callback):
        def on_step(self, t):
            now = poison and t.step == poison and t.rollbacks == 0
            if now and t.accelerator.process_index == 1: t.loss_total.fill_(float("nan"))
            if stop and t.step == stop and t.accelerator.process_index == 1: t.stop("enough for now")
    try:
        run = configure("transformer", flags, log=lambda words: None)
        usual = [c for c in default_callbacks(run) if results or not isinstance(c, Results)]
        t = make_trainer(run, callbacks=[*usual, Extra()], log=lambda words: None)
    except ConfigError as error:
        if dist.get_rank() == 0: print("refused:", error, flush=True)
        continue
    t.train()
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (t.step, t.rollbacks, t.best, t.best_step, t.lr_backoff))
    assert len(set(seen)) == 1, seen
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def data(): return load_data(DataConfig(sequence_length=32))


def one(folder, data, extra=(), **flags):
    run = configure("transformer", {**TINY, "output_dir": str(folder), **flags},
                    log=lambda words: None)
    t = make_trainer(run, data=data,
                     callbacks=[*(c for c in default_callbacks(run) if not isinstance(c, Results)),
                                *extra], log=lambda words: None)
    t.train()
    return t


def several(tmp_path, *runs, processes=2):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    runs = json.dumps([{**TINY, **{k: str(v) if k == "output_dir" else v for k,
                                   v in flags.items()}} for flags in runs])
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node", str(processes), str(script), runs],
                         capture_output=True, text=True, timeout=180,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def same_losses(a: Run, b: Run, tolerance=1e-4):
    for name in ("training_log", "eval_log"):
        x, y = read_log(getattr(a, name)), read_log(getattr(b, name))
        assert x["step"] == y["step"] and max(abs(u - v) for u,
                                              v in zip(x["loss"], y["loss"])) < tolerance, (name,
                                                                                            x["loss"], y["loss"])
    x, y = (read_log(run.training_log)["grad_norm"] for run in (a, b))
    assert x[0] is None or max(abs(u - v) for u, v in zip(x, y)) < 1e-3, (x, y)


SHAPES = {"plain": {},
          "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
          "grouped": {"num_heads": 4, "num_key_value_heads": 2, "qk_norm": True,
                      "tie_word_embeddings": True},
          "post": {"norm": "post", "activation": "silu", "max_grad_norm": None},
          "muon": {"optimizer": "muon"}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    return {name: one(tmp_path_factory.mktemp(name), data, **flags) for name,
            flags in SHAPES.items()}


@pytest.mark.parametrize("mode", ["sharded", "tensor"])
def test_two_processes_give_the_losses_of_one(tmp_path, alone, mode):
    several(tmp_path,
            *({**flags, "parallel": mode, "output_dir": tmp_path / name,
               "results": name == "grouped" and mode == "tensor"} for name,
              flags in SHAPES.items()))
    for name, flags in SHAPES.items():
        run = Run(tmp_path / name)
        # Muon rounds to bfloat16
        same_losses(alone[name].run, run, 1e-3 if name == "muon" else 1e-4)
        assert damage(run.step_folder(16)) is None
        if name == "grouped" and mode == "tensor":
            assert run.generations.exists() and run.evaluation.exists()
            assert json.loads(run.summary.read_text())["state"] == "finished"
        model, _ = load_model(run.step_folder(16))
        assert type(model) is TransformerForCausalLM and model.config.architectures == ["TransformerForCausalLM"]
        for (key, a), b in zip(alone[name].model.state_dict().items(), model.state_dict().values()):
            assert (a - b).abs().max() < 1e-3, key


class StopAt(Callback):
    def __init__(self, step): self.step = step
    def on_step(self, t): t.step == self.step and t.stop("enough for now")


def test_modes_and_numbers_of_processes_continue_each_other(tmp_path, data):
    whole = one(tmp_path / "whole", data, max_steps=32)
    resumed = {"output_dir": tmp_path / "run", "resume_from": "auto", "max_steps": 32}
    several(tmp_path, {**resumed, "parallel": "sharded", "stop": 7})
    assert Run(tmp_path / "run").steps()[-1] == 7
    t = one(tmp_path / "run", data, [StopAt(16)], resume_from="auto", max_steps=32, parallel="data")
    assert t.step == 16 and read_log(t.run.training_log)["step"][:5] == [2, 4, 6, 8, 10]
    several(tmp_path, {**resumed, "parallel": "tensor", "stop": 23},
            {**resumed, "parallel": "sharded"})
    same_losses(whole.run, Run(tmp_path / "run"))


def test_guards_decide_alike_on_all_processes(tmp_path):
    several(tmp_path,
            *({"parallel": mode, "output_dir": tmp_path / mode, "poison": 10, "max_steps": 12,
               "eval_interval": 4, "early_stopping_patience": 3} for mode in ("sharded", "tensor")),
            {"parallel": "tensor", "batch_size": 3, "max_steps": 4,
             "output_dir": tmp_path / "three"})
    for mode in ("sharded", "tensor"):
        assert json.loads((Run(tmp_path / mode).step_folder(12) / "trainer_state.json").read_text())["rollbacks"] == 1
    assert Run(tmp_path / "three").steps()[-1] == 4


def test_bf16_is_near_fp32(tmp_path, data):
    several(tmp_path, *({"parallel": mode, "mixed_precision": "bf16",
                         "output_dir": tmp_path / mode} for mode in ("sharded", "tensor")))
    alone = one(tmp_path / "alone", data, mixed_precision="bf16")
    for mode in ("sharded", "tensor"): same_losses_roughly(alone.run, Run(tmp_path / mode))
    model, _ = load_model(Run(tmp_path / "sharded").step_folder(16))
    assert next(model.parameters()).dtype == torch.float32, "master weights"


def same_losses_roughly(a, b):
    x, y = (read_log(run.eval_log)["loss"] for run in (a, b))
    assert max(abs(u - v) for u, v in zip(x, y)) < 0.02, (x, y)


@pytest.mark.parametrize("flags, said",
                         [({"mixed_precision": "fp16"}, "fp16"), ({"compile": True}, "compile")])
def test_settings_that_cannot_work_are_refused(flags, said):
    with pytest.raises(ConfigError, match=said) as error:
        TrainingConfig(parallel="sharded", **flags)
    assert "\n" not in str(error.value)


def test_models_and_processes_that_cannot_work_are_refused(tmp_path, data):
    from sprout_lab.models.sprout import SproutConfig, SproutForCausalLM
    with pytest.raises(ConfigError, match="torchrun"):
        one(tmp_path / "run", data, parallel="tensor")
    model = TransformerForCausalLM(TransformerConfig(hidden_size=48, num_attention_heads=4,
                                                     num_key_value_heads=1, intermediate_size=63))
    with pytest.raises(ConfigError, match="num_key_value_heads=1"):
        check_parallel(model, "tensor", 2)
    with pytest.raises(ConfigError, match="num_attention_heads=4"):
        check_parallel(model, "tensor", 3)
    with pytest.raises(ConfigError, match="cannot grow"):
        check_parallel(SproutForCausalLM(SproutConfig()), "sharded", 2)
    said = several(tmp_path,
                   {"parallel": "sharded", "batch_size": 3, "output_dir": tmp_path / "odd"},
                   {"parallel": "tensor", "hidden_size": 48, "num_heads": 3,
                    "output_dir": tmp_path / "heads"})
    assert "batch_size=3" in said and "num_attention_heads=3" in said and len(said.splitlines()) == 2
