"""Growth in the trainer: policies, tidying, resume to the bit, rollback, two processes."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sprout_lab.configs import ConfigError, DataConfig, OutputConfig, RunConfig, TrainingConfig
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.models.sprout import SproutConfig, SproutForCausalLM, SproutForMaskedLM
from sprout_lab.runs import read_log
from sprout_lab.trainers.growth import (
    EpochSummary, Growth, GrowthPolicy, ImbalanceGrowth, PlateauGrowth, POLICIES, ThresholdGrowth, idle_nodes, make_policy, prune_and_merge, similar_leaves)
from sprout_lab.trainers.trainer import Trainer


class Text:
    "Bytes as the trainer takes them."
    name, bytes_per_token = "shakespeare", None
    def __init__(self, split): self.ids = np.frombuffer("".join(load_corpus("shakespeare").documents(split)).encode(), np.uint8)[:3000 if split == "validation" else None]
    def __len__(self): return len(self.ids)
    def __getitem__(self, index): return self.ids[index]


def trainer(folder, growth=None, extra=(), said=None, causal=False, model=(), **training):
    tokenizer = ByteTokenizer(masked=True)
    data = SimpleNamespace(train=Text("train"), validation=Text("validation"), tokenizer=tokenizer, name="shakespeare")
    torch.manual_seed(0)
    config = SproutConfig(**{**dict(hidden_size=32, num_attention_heads=2, dropout=0.1, growth_warmup=5, growth_interval=5, max_nodes=5), **dict(model)})
    settings = TrainingConfig(**{**dict(batch_size=4, max_steps=36, learning_rate=3e-3, warmup_steps=5, eval_interval=10, eval_batches=2, save_interval=6, log_interval=4,
                                        keep_checkpoints=100, device="cpu"), **training})
    run = RunConfig("sprout", {}, DataConfig(sequence_length=32), settings, OutputConfig(output_dir=str(folder), tensorboard=False, sample_tokens=0))
    said = [] if said is None else said
    model = (SproutForCausalLM if causal else SproutForMaskedLM)(config)
    return Trainer(model, data, run, log=said.append, extra_callbacks=[growth or Growth(), *extra])


def state(one): return {name: value.clone() for name, value in one.model.state_dict().items()}


@pytest.mark.parametrize("settings", [
    dict(), dict(optimizer="muon"), dict(mixed_precision="bf16", gradient_accumulation_steps=2), dict(causal=True),
    dict(model=dict(growth="plateau")), dict(model=dict(growth="imbalance", routing="token"))], ids=str)
def test_a_resumed_tree_equals_one_that_never_stopped(tmp_path, settings):
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    if settings.get("model", {}).get("growth") != "plateau": assert len(whole.model.tree.nodes) == 5
    for step in (6, 18) if not settings else (18,):   # before most of the tree has grown, and in the middle of it
        again = trainer(tmp_path / f"again{step}", **settings)
        checkpoint = whole.run.step_folder(step)
        again.load_state(checkpoint)
        assert again.step == step
        again.train()
        assert again.model.config.tree == whole.model.config.tree and again.model.config.history == whole.model.config.history
        theirs = state(again)
        for name, value in state(whole).items(): assert torch.equal(value, theirs[name]), name


def test_what_grew_at_a_step_is_in_that_steps_checkpoint(tmp_path):
    one = trainer(tmp_path, model=dict(growth_warmup=6, growth_interval=6))
    one.train()
    for step, nodes in ((6, 2), (12, 3), (18, 4), (24, 5)):
        saved = SproutForMaskedLM.from_pretrained(one.run.step_folder(step))
        assert len(saved.tree.nodes) == nodes == len(saved.config.tree)
    log = read_log(one.run.logs / "tree_log.csv")
    assert log["nodes"] == sorted(log["nodes"]) and log["nodes"][-1] == 5 and log["step"] == sorted(log["step"])
    assert [len(str(tree).split()) for tree in log["tree"]] == log["nodes"] == [len(str(usage).split()) for usage in log["usage"]]
    facts = json.loads((one.run.step_folder(36) / "facts.json").read_text())
    assert facts["model_info"]["total_nodes"] == 5 and facts["model_info"]["node_limit_reached"] and facts["model_info"]["total_params"] > 0
    assert {"epoch", "loss", "accuracy", "model_info"} <= set(facts)


def test_a_rollback_takes_the_tree_back_too(tmp_path):
    class Break(Growth):
        "Spoils the weights once, after growth."
        def on_step(self, trainer):
            super().on_step(trainer)
            if trainer.step == 23 and not trainer.rollbacks:
                with torch.no_grad(): trainer.model.tree.nodes[0].mlp.w1.weight.fill_(torch.nan)

    said = []
    one = trainer(tmp_path, growth=Break(), said=said, model=dict(growth_warmup=20, growth_interval=2), save_interval=20, eval_interval=100)
    one.train()
    assert one.rollbacks == 1 and one.step == 36 and all(p.isfinite().all() for p in one.model.parameters())
    assert any("back to step 20" in line for line in said)
    known = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in one.model.parameters()} and len(one.model.tree.nodes) == 5
    steps = [event["step"] for event in one.model.config.history]
    assert steps == sorted(set(steps)), "what grew after the checkpoint is forgotten"
    log = read_log(one.run.logs / "tree_log.csv")["step"]
    assert log == sorted(log)


def test_a_grown_child_is_trained_within_ten_steps(tmp_path):
    born = {}

    class Remember(Growth):
        def on_step(self, trainer):
            super().on_step(trainer)
            for event in trainer.model.config.history or []:
                if event["step"] == trainer.step: born[event["child_id"]] = (trainer.step, {n: p.detach().clone() for n, p in trainer.model.tree.nodes[event["child_id"]].named_parameters()})
            for child, (step, weights) in born.items():
                if trainer.step == step + 10:
                    for name, p in trainer.model.tree.nodes[child].named_parameters():
                        if name in weights and name.endswith(("q_proj.weight", "o_proj.weight", "w1.weight", "w2.weight")): assert not torch.equal(p, weights[name]), (child, name)

    trainer(tmp_path, growth=Remember()).train()
    assert len(born) == 4


def test_console_lines(tmp_path):
    said = []
    trainer(tmp_path, extra=[EpochSummary()], said=said, model=dict(visualize_structure=True)).train()
    text = "\n".join(said)
    assert "Epoch 1/1 Summary:\n  Loss: " in text and "  Total nodes: 5/5\n  Node limit reached: True" in text and "⚠️  Node limit reached: 5/5 nodes" in text
    assert "=== SPROUT Structure ===\n└── Node 0 (depth=0, children=" in text and "branched (best compatibility" in text


# ---- policies -----------------------------------------------------------------------------------------------------
def toy(**fields):
    torch.manual_seed(0)
    return SproutForMaskedLM(SproutConfig(**{**dict(vocab_size=50, hidden_size=32, num_attention_heads=2, max_nodes=6, growth_patience=1), **fields})).train()


def feed(model, n=2):
    for seed in range(n): model(torch.randint(50, (16, 8), generator=torch.Generator().manual_seed(seed)))


def test_none_never_grows_and_unknown_names_are_answered():
    model = toy()
    for step in range(5): feed(model); assert GrowthPolicy().grow(model, step=step) == []
    assert model.config.parents == [-1] and set(POLICIES) == {"threshold", "plateau", "imbalance", "none"}
    with pytest.raises(ConfigError, match="did you mean 'plateau'"): make_policy("plato")


def test_threshold_respects_patience():
    model = toy(max_depth=1, compatibility_threshold=1.0, growth_patience=3)
    sizes = []
    for step in range(8): feed(model); ThresholdGrowth().grow(model, step=step); sizes.append(len(model.tree.nodes))
    assert sizes == [2, 2, 2, 3, 4, 5, 6, 6]   # the first child at once, then three checks below the threshold


def test_plateau_waits_for_one():
    model, policy, sizes = toy(max_depth=1, compatibility_threshold=0.0), PlateauGrowth(patience=2), []
    for step, loss in enumerate([None, 5.0, 4.0, 3.99, 3.98, 3.0, 3.0, 3.0]):
        feed(model)
        policy.grow(model, step=step, loss=loss)
        sizes.append(len(model.tree.nodes))
    assert sizes == [1, 1, 1, 1, 2, 2, 2, 3]
    twin = PlateauGrowth(patience=2)
    twin.load_state(json.loads(json.dumps(policy.state())))
    assert twin.state() == policy.state()


def test_imbalance_relieves_the_busiest():
    model = toy(max_depth=1, compatibility_threshold=0.0)
    for step in range(2): feed(model); events = ImbalanceGrowth(0.6).grow(model, step=step)
    assert model.config.tree == [-1, 0, 0] and events[-1].action == "branched"   # one child has all of the traffic
    feed(model, 6)
    counts = [int(model.tree.nodes[i].arrived) for i in (1, 2)]
    ImbalanceGrowth(max(counts) / sum(counts) + 0.01).grow(model, step=9)
    assert len(model.tree.nodes) == 3


def test_tidy_prunes_the_idle_and_merges_old_twins():
    model = toy(tree=[-1, 0, 0, 2], max_nodes=8, router="blind")
    with torch.no_grad(): model.tree.nodes[1].key.copy_(model.tree.nodes[0].router.constant); model.tree.nodes[2].key.copy_(-model.tree.nodes[0].router.constant)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2): feed(model); GrowthPolicy().grow(model, step=step)
    assert idle_nodes(model.tree, 2) == [2] and idle_nodes(model.tree, 3) == []
    before = model.eval()(ids := torch.randint(50, (8, 8))).logits
    events = prune_and_merge(model.train(), prune_after=2, optimizer=optimizer, step=7)
    assert [(e.action, e.child_id, e.step) for e in events] == [("pruned", 2, 7)] and model.config.tree == [-1, 0]
    torch.testing.assert_close(model.eval()(ids).logits, before)

    model = toy(tree=[-1, 0], max_depth=1, max_nodes=3)
    feed(model)
    model.grow(parents=[0])
    assert similar_leaves(model.tree, 0.05) == [], "a newborn is no twin yet"
    for step in range(3): feed(model); GrowthPolicy().grow(model, step=step)
    (one, other, difference), = similar_leaves(model.tree, 0.05)
    assert (one, other) == (1, 2) and 0 < difference < 0.05
    before = model.eval()(ids).logits
    event, = prune_and_merge(model.train(), merge_tolerance=0.05)
    assert event.action == "merged" and (model.eval()(ids).logits - before).norm() < 0.02 * before.norm()


# ---- two processes ------------------------------------------------------------------------------------------------
TWO = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_growth import trainer
import torch.distributed as dist
one = trainer(sys.argv[1], model=dict(dropout=0.0, router_balance=0.0), max_steps=24)
one.train()
if dist.is_initialized():
    everyone = [None, None]
    dist.all_gather_object(everyone, (one.model.config.tree, one.model.tree.usage(), [p.double().sum().item() for p in one.model.parameters()]))
    assert everyone[0] == everyone[1], everyone
if one.accelerator.is_main_process: print("RESULT", (one.model.config.tree, one.model.tree.usage(), [(e["step"], e["action"], e["child_id"]) for e in one.model.config.history]))
if dist.is_initialized(): dist.destroy_process_group()
"""


def test_two_processes_grow_the_same_tree(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO.format(tests=os.path.dirname(os.path.abspath(__file__))))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path / "two")], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one = trainer(tmp_path / "one", model=dict(dropout=0.0, router_balance=0.0), max_steps=24)
    one.train()
    alone = one.model.config.tree, one.model.tree.usage(), [(e["step"], e["action"], e["child_id"]) for e in one.model.config.history]
    results = alone, eval(done.stdout.split("RESULT")[1].strip())
    (tree, usage, history), (tree2, usage2, history2) = results
    assert tree == tree2 and history == history2 and len(tree) == 5
    assert usage[0] == usage2[0] == 24 * 4   # a process's mean loss counts its own masks, so that single texts may go another way; all are counted
    saved = SproutForMaskedLM.from_pretrained(tmp_path / "two" / "checkpoints" / "step_24")
    assert saved.tree.usage() == usage2, "the checkpoint counts what all processes saw"


def test_a_tree_with_fewer_nodes_than_were_saved_is_not_loaded(tmp_path):
    import sprout_lab.families   # makes the models known to the Auto classes
    from sprout_lab.trainers.checkpoints import load_pretrained
    SproutForMaskedLM(SproutConfig(hidden_size=16, num_attention_heads=2, tree=[-1, 0, 1, 0])).save_pretrained(tmp_path)
    assert len(load_pretrained(tmp_path).tree.nodes) == 4
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((tmp_path / "config.json").read_text()), "tree": [-1, 0]}))
    with pytest.raises(ConfigError, match="do not fit its configuration"): load_pretrained(tmp_path)


def test_a_policys_memory_that_is_none_is_refused(tmp_path):
    for state in ({"a": 1}, {"best": "x", "waited": "y"}):
        with pytest.raises(ConfigError, match="growth_state"): trainer(tmp_path / str(len(str(state))), model=dict(growth="plateau", growth_state=state)).train()
