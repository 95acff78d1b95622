"""Growth in the trainer: policies, pruning and merging, resume to the bit, rollback, two processes.
"""
import ast
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sprout_lab.configs import ConfigError
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.families import configure, make_trainer
from sprout_lab.models.sprout import SproutConfig, SproutForMaskedLM
from sprout_lab.runs import read_log
from sprout_lab.trainers.growth import (
    Growth, GrowthPolicy, ImbalanceGrowth, PlateauGrowth, POLICIES, ThresholdGrowth,
    growth_sentence,
    idle_nodes, make_policy, prune_and_merge, similar_leaves)


class Text:
    "Bytes as the trainer takes them."
    name, bytes_per_token = "shakespeare", None

    def __init__(self, split):
        text = "".join(load_corpus("shakespeare").documents(split)).encode()
        self.ids = np.frombuffer(text[:3000] if split == "validation" else text, np.uint8)

    def __len__(self): return len(self.ids)
    def __getitem__(self, index): return self.ids[index]


USUAL = dict(
    hidden_size=32, num_attention_heads=2, dropout=0.1, growth_warmup=5, growth_interval=5,
    max_nodes=5,
    sequence_length=32, batch_size=4, max_steps=36, optimizer="adamw", learning_rate=3e-3,
    warmup_steps=5, eval_interval=10, eval_batches=2, save_interval=6, log_interval=4,
    keep_checkpoints=100, device="cpu", tensorboard=False, sample_tokens=0)


def trainer(folder, callback=None, lines=None, **flags):
    """A small run in `folder`; `callback` takes the place of its `Growth`, `lines` gets what it
    says."""
    data = SimpleNamespace(train=Text("train"), validation=Text("validation"), name="shakespeare",
                           tokenizer=ByteTokenizer(masked=True), vocab_size=259)
    run = configure("sprout", {**USUAL, "output_dir": str(folder), **flags})
    made = make_trainer(run, data=data, log=(lines if lines is not None else []).append)
    if callback is not None:
        place = next(i for i, c in enumerate(made.callbacks) if isinstance(c, Growth))
        made.callbacks[place] = callback
    return made


def state(one): return {name: value.clone() for name, value in one.model.state_dict().items()}


@pytest.mark.parametrize("settings", [
    dict(), dict(optimizer="muon"), dict(mixed_precision="bf16", gradient_accumulation_steps=2),
    dict(objective="causal"), dict(growth="plateau"), dict(growth="imbalance", routing="token")],
    ids=str)
def test_a_resumed_tree_equals_one_that_never_stopped(tmp_path, settings):
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    if settings.get("growth") != "plateau": assert len(whole.model.tree.nodes) == 5
    # before most of the tree has grown, and in the middle of it
    for step in (6, 18) if not settings else (18,):
        again = trainer(tmp_path / f"again{step}", **settings)
        checkpoint = whole.run.step_folder(step)
        again.load_state(checkpoint)
        assert again.step == step
        again.train()
        assert again.model.config.tree == whole.model.config.tree
        assert again.model.config.history == whole.model.config.history
        theirs = state(again)
        for name, value in state(whole).items(): assert torch.equal(value, theirs[name]), name


def test_what_grew_at_a_step_is_in_that_steps_checkpoint(tmp_path):
    one = trainer(tmp_path, growth_warmup=6, growth_interval=6, max_depth=1)
    one.train()
    for step, nodes in ((6, 2), (12, 3), (18, 4), (24, 5)):
        saved = SproutForMaskedLM.from_pretrained(one.run.step_folder(step))
        assert len(saved.tree.nodes) == nodes == len(saved.config.tree)
    log = read_log(one.run.logs / "tree_log.csv")
    assert log["nodes"] == sorted(log["nodes"]) and log["nodes"][-1] == 5
    assert log["step"] == sorted(log["step"])
    for column in ("tree", "usage"):
        assert [len(str(cell).split()) for cell in log[column]] == log["nodes"]
    facts = json.loads((one.run.step_folder(36) / "facts.json").read_text())
    info = facts["model_info"]
    assert info["total_nodes"] == 5 and info["node_limit_reached"] and info["total_params"] > 0
    assert {"epoch", "loss", "accuracy", "model_info"} <= set(facts)


def test_a_rollback_takes_the_tree_back_too(tmp_path):
    class Break(Growth):
        "Spoils the weights once, after growth."
        def on_step(self, trainer):
            super().on_step(trainer)
            if trainer.step == 23 and not trainer.rollbacks:
                with torch.no_grad(): trainer.model.tree.nodes[0].mlp.w1.weight.fill_(torch.nan)

    lines = []
    one = trainer(tmp_path, Break(), lines, growth_warmup=20, growth_interval=2, save_interval=20,
                  eval_interval=100)
    one.train()
    assert one.rollbacks == 1 and one.step == 36
    assert all(p.isfinite().all() for p in one.model.parameters())
    assert any("back to step 20" in line for line in lines)
    known = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in one.model.parameters()} and len(one.model.tree.nodes) == 5
    steps = [event["step"] for event in one.model.config.history]
    assert steps == sorted(set(steps)), "what grew after the checkpoint is forgotten"
    log = read_log(one.run.logs / "tree_log.csv")["step"]
    assert log == sorted(log)


class Remember(Growth):
    "Keeps the weights of every node as it was born, and looks at them again ten steps later."

    def __init__(self):
        super().__init__()
        self.born, self.looked_at = {}, []

    def on_step(self, trainer):
        super().on_step(trainer)
        nodes, history = trainer.model.tree.nodes, trainer.model.config.history or []
        for child in (event["child_id"] for event in history if event["step"] == trainer.step):
            weights = {name: p.detach().clone() for name, p in nodes[child].named_parameters()}
            self.born[child] = trainer.step, weights
        for child, (step, weights) in self.born.items():
            if trainer.step == step + 10: self.check(child, weights, nodes[child])

    def check(self, child, weights, node):
        for name, p in node.named_parameters():
            matrix = name.endswith(("q_proj.weight", "o_proj.weight", "w1.weight", "w2.weight"))
            if matrix and name in weights: assert not torch.equal(p, weights[name]), (child, name)
        self.looked_at.append(child)


def test_a_grown_child_is_trained_within_ten_steps(tmp_path):
    remember = Remember()
    trainer(tmp_path, remember, max_depth=1).train()
    assert len(remember.born) == 4 and remember.looked_at == [1, 2, 3, 4]


def test_console_lines(tmp_path):
    lines = []
    trainer(tmp_path, lines=lines, visualize_structure=True).train()
    text = "\n".join(lines)
    for said in ("Epoch 1/1 Summary:\n  Loss: ", "  Total nodes: 5/5\n  Node limit reached: True",
                 "⚠️  Node limit reached: 5/5 nodes", "branched (best compatibility",
                 "=== SPROUT Structure ===\n└── Node 0 (depth=0, children="):
        assert said in text, said


def test_each_sentence_tells_the_nodes_of_its_moment(tmp_path):
    lines = []
    trainer(tmp_path, Growth(limit=3), lines, compatibility_threshold=1.0).train()
    grown = [line for line in lines if "sprouted" in line or "branched" in line]
    # in the second check two things happen: a leaf sprouts, and a branch is copied with it
    assert [line.split()[1] for line in grown] == ["5", "10", "10"]
    assert [line.split("; ")[1] for line in grown] == ["2/5 nodes", "3/5 nodes", "5/5 nodes"]

    model = toy(tree=[-1, 0, 0, 0], max_depth=1)
    events = [model.merge(1, 2, step=7), *model.prune([1, 2], step=8)]
    ends = [growth_sentence(event, 6).split("; ")[1] for event in events]
    assert ends == ["3/6 nodes", "1/6 nodes", "1/6 nodes"]


@pytest.mark.parametrize("flags, told",
                         [(dict(routing="token"), True), (dict(routing="sequence"), False),
                                         (dict(), False)], ids=str)
def test_another_routing_on_resume_is_said(tmp_path, flags, told):
    trainer(tmp_path, max_steps=12).train()
    lines = []
    again = trainer(tmp_path, lines=lines, resume_from="auto", max_steps=18, **flags)
    said = [line for line in lines if "routing=" in line]
    if told: assert said == ["routing=token: step_12 was trained with routing=sequence; texts take "
                             "other paths from here on"]
    else: assert not said
    again.train()
    assert again.step == 18


# ---- policies -----------------------------------------------------------------------------------
def toy(**fields):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, num_attention_heads=2, max_nodes=6)
    return SproutForMaskedLM(SproutConfig(**{**shape, **fields})).train()


def feed(model, n=2):
    for seed in range(n):
        random = torch.Generator().manual_seed(seed)
        model(torch.randint(50, (16, 8), generator=random))


def test_none_never_grows_and_unknown_names_are_answered():
    model = toy()
    for step in range(5):
        feed(model)
        assert GrowthPolicy().grow(model, step=step) == []
    assert model.config.parents == [-1]
    assert set(POLICIES) == {"threshold", "plateau", "imbalance", "none"}
    with pytest.raises(ConfigError, match="did you mean 'plateau'"): make_policy("plato")


def test_threshold_respects_patience():
    model = toy(max_depth=1, compatibility_threshold=1.0, growth_patience=3)
    sizes = []
    for step in range(8):
        feed(model)
        ThresholdGrowth().grow(model, step=step)
        sizes.append(len(model.tree.nodes))
    # the first child at once, then three checks below the threshold
    assert sizes == [2, 2, 2, 3, 4, 5, 6, 6]


def test_plateau_waits_for_one():
    model, sizes = toy(max_depth=1, compatibility_threshold=0.0), []
    policy = PlateauGrowth(patience=2)
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
    for step in range(2):
        feed(model)
        events = ImbalanceGrowth(0.6).grow(model, step=step)
    # one child had all of the traffic
    assert model.config.tree == [-1, 0, 0] and events[-1].action == "branched"
    feed(model, 6)
    counts = [int(model.tree.nodes[i].arrived) for i in (1, 2)]
    ImbalanceGrowth(max(counts) / sum(counts) + 0.01).grow(model, step=9)
    assert len(model.tree.nodes) == 3


def checks(model, number):
    "Growth checks at which nothing grows: who was here, who was not?"
    for step in range(number):
        feed(model)
        GrowthPolicy().grow(model, step=step)


def test_the_idle_are_pruned():
    model = toy(tree=[-1, 0, 0, 2], max_nodes=8, router="blind")
    root, one, other, _ = model.tree.nodes
    with torch.no_grad():
        one.key.copy_(root.router.constant)
        other.key.copy_(-root.router.constant)
    optimizer = torch.optim.AdamW(model.parameters())
    checks(model, 2)
    assert idle_nodes(model.tree, 2) == [2] and idle_nodes(model.tree, 3) == []
    before = model.eval()(ids := torch.randint(50, (8, 8))).logits
    events = prune_and_merge(model.train(), prune_after=2, optimizer=optimizer, step=7)
    assert [(e.action, e.child_id, e.step) for e in events] == [("pruned", 2, 7)]
    assert model.config.tree == [-1, 0]
    torch.testing.assert_close(model.eval()(ids).logits, before)


def test_similar_leaves_are_merged_when_they_are_old_enough():
    model, ids = toy(tree=[-1, 0], max_depth=1, max_nodes=3), torch.randint(50, (8, 8))
    feed(model)
    model.grow(parents=[0])
    assert similar_leaves(model.tree, 0.05) == [], "a newborn is no twin yet"
    checks(model, 3)
    (one, other, difference), = similar_leaves(model.tree, 0.05)
    assert (one, other) == (1, 2) and 0 < difference < 0.05
    before = model.eval()(ids).logits
    event, = prune_and_merge(model.train(), merge_tolerance=0.05)
    assert event.action == "merged"
    assert (model.eval()(ids).logits - before).norm() < 0.02 * before.norm()


# ---- two processes ------------------------------------------------------------------------------
TWO = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_growth import facts_of, trainer
import torch.distributed as dist
one = trainer(sys.argv[1], dropout=0.0, router_balance=0.0, max_steps=24)
one.train()
if dist.is_initialized():
    everyone = [None, None]
    weights = [p.double().sum().item() for p in one.model.parameters()]
    dist.all_gather_object(everyone, (*facts_of(one), weights))
    assert everyone[0] == everyone[1], everyone
if one.accelerator.is_main_process: print("RESULT", facts_of(one))
if dist.is_initialized(): dist.destroy_process_group()
"""


def facts_of(one):
    history = [(e["step"], e["action"], e["child_id"]) for e in one.model.config.history]
    return one.model.config.tree, one.model.tree.usage(), history


def test_two_processes_grow_the_same_tree(tmp_path):
    tests = os.path.dirname(os.path.abspath(__file__))
    script = tmp_path / "run.py"
    script.write_text(TWO.format(tests=tests))
    path = os.pathsep.join([os.path.dirname(tests), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
              "2"]
    done = subprocess.run([*launch, str(script), str(tmp_path / "two")], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one = trainer(tmp_path / "one", dropout=0.0, router_balance=0.0, max_steps=24)
    one.train()
    tree, usage, history = facts_of(one)
    tree2, usage2, history2 = ast.literal_eval(done.stdout.split("RESULT")[1].strip())
    assert tree == tree2 and history == history2 and len(tree) == 5
    # a process's mean loss counts its own masks, so that single texts may go another way; all are
    # counted
    assert usage[0] == usage2[0] == 24 * 4
    saved = SproutForMaskedLM.from_pretrained(tmp_path / "two" / "checkpoints" / "step_24")
    assert saved.tree.usage() == usage2, "the checkpoint counts what all processes saw"


def test_a_tree_with_fewer_nodes_than_were_saved_is_not_loaded(tmp_path):
    from sprout_lab.trainers.checkpoints import load_pretrained
    config = SproutConfig(hidden_size=16, num_attention_heads=2, tree=[-1, 0, 1, 0])
    SproutForMaskedLM(config).save_pretrained(tmp_path)
    assert len(load_pretrained(tmp_path).tree.nodes) == 4
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tree": [-1, 0]}))
    with pytest.raises(ConfigError, match="do not fit its configuration"): load_pretrained(tmp_path)


@pytest.mark.parametrize("state", [{"a": 1}, {"best": "x", "waited": "y"}], ids=str)
def test_a_policys_memory_that_is_none_is_refused(tmp_path, state):
    one = trainer(tmp_path, growth="plateau")
    one.model.config.growth_state = state
    with pytest.raises(ConfigError, match="growth_state"): one.train()
