"""SPROUT: the laws, growth as a step of training, save and load, two processes."""
import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.testing import assert_close

from laws import check_alone_or_together, check_laws, perturbed
from sprout_lab.configs import ConfigError, read_preset, canonical
from sprout_lab.models.sprout import (
    SproutConfig, SproutForCausalLM, SproutForMaskedLM, SproutLanguageModel, SproutModel,
    tree_depths)

SHAPE = dict(vocab_size=50, hidden_size=32, num_attention_heads=2, max_position_embeddings=64)
TREES = [None, [-1, 0], [-1, 0, 0, 1, 1, 2]]


def build(model_class=SproutForMaskedLM, seed=0, **fields):
    torch.manual_seed(seed)
    return model_class(SproutConfig(**{**SHAPE, "max_nodes": 8, **fields}))


def batch(rows=8, length=12, seed=0, vocab=50):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab - 1, (rows, length), generator=random)
    hidden = torch.rand(ids.shape, generator=random) < 0.3
    return {"input_ids": ids.masked_fill(hidden, vocab - 1),
            "labels": ids.masked_fill(~hidden, -100)}


def train(model, optimizer, steps, seed=0):
    model.train()
    for step in range(steps):
        loss = model(**batch(seed=seed + step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def checkpoint_activations(model):   # transformers 5.2x renamed it
    usual = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", usual)({"use_reentrant": False})


# ---- laws ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("tree", TREES)
def test_the_causal_tree_keeps_the_laws(tree):
    check_laws(build(SproutForCausalLM, tree=tree))


@pytest.mark.parametrize("routing", ["sequence", "token"])
@pytest.mark.parametrize("tree", TREES)
def test_an_example_depends_on_neither_batch_mates_nor_padding(routing, tree):
    model = perturbed(build(tree=tree, routing=routing))
    check_alone_or_together(model)
    ids = torch.randint(50, (1, 9))
    alone = model(ids, log_paths=True).path_log.paths()
    among = torch.cat([torch.randint(50, (6, 9)), ids])
    together = model(among, log_paths=True).path_log.paths()
    assert torch.equal(together[:len(alone), -1], alone[:, 0])


def test_batch_routing_takes_one_path():
    model = build(tree=TREES[-1], routing="batch").eval()
    log = model(torch.randint(50, (16, 9)), log_paths=True).path_log
    assert log.paths().unique(dim=1).shape[1] == 1


def test_a_causal_model_refuses_to_route_by_the_future():
    for routing in ("sequence", "batch"):
        with pytest.raises(ConfigError, match="must not choose a path by what follows"):
            build(SproutForCausalLM, routing=routing)


def test_generation_and_cache_surgery():
    model = perturbed(build(SproutForCausalLM, tree=TREES[-1]))
    ids = torch.randint(49, (3, 7))
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, expected)
    assert model.generate(ids, max_new_tokens=4, num_beams=3).shape == (3, 11)
    cache = model.make_cache(3, 16)
    model(ids, past_key_values=cache)
    copied = cache.fork([2, 0])
    cache.select(torch.tensor([2, 0]))
    more = torch.randint(49, (2, 2))
    want = model(torch.cat([ids[[2, 0]], more], 1), use_cache=False).logits[:, -2:]
    for one in (cache, copied): assert_close(model(more, past_key_values=one).logits, want)
    left = torch.cat([torch.zeros(3, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(3, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    assert torch.equal(model.generate(left, attention_mask=mask, max_new_tokens=6,
                                      do_sample=False)[:, 3:], greedy)


# ---- router -------------------------------------------------------------------------------------
@pytest.mark.parametrize("routing", ["sequence", "token"])
def test_the_router_sees_its_input_and_learns(routing):
    model = build(tree=[-1, 0, 0], routing=routing)
    model = perturbed(model).train()
    log = model(torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]]), log_paths=True).path_log
    children, _, table = log.compatibilities()[0]
    assert children == [1, 2] and (table[0] - table[-1]).abs().max() > 1e-4
    model(**batch()).loss.backward()
    for name in ("nodes.0.router.query.weight", "nodes.0.router.norm.weight", "nodes.1.key",
                 "nodes.2.key"):
        gradient = model.sprout.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 0, name


def test_the_gate_alone_trains_the_router():
    model = perturbed(build(tree=[-1, 0], router_balance=0.0)).train()
    model(**batch()).loss.backward()
    root, child = model.sprout.nodes
    assert root.router.query.weight.grad.abs().max() > 0 and child.key.grad.abs().max() > 0


def test_a_blind_router_is_blind_and_an_open_one_is_an_encoder():
    blind = build(tree=[-1, 0, 0], router="blind").eval()
    log = blind(torch.randint(50, (5, 7)), log_paths=True).path_log
    _, _, table = log.compatibilities()[0]
    assert_close(table, table[:1].expand_as(table))
    open_ = build(tree=[-1, 0, 1], router="open").eval()
    x = open_.sprout.embed_tokens(ids := torch.randint(50, (2, 7)))
    cos_sin = open_.sprout.rope.cos_sin(x, None, 0, 7)
    for node in open_.sprout.nodes: x = node(x, cos_sin=cos_sin)
    assert_close(open_.sprout(ids).last_hidden_state, x)


@pytest.mark.parametrize("model_class, routing", [
    (SproutForMaskedLM, "sequence"), (SproutForMaskedLM, "token"), (SproutForCausalLM, "token")])
def test_context_bias_attentions_and_path_log(model_class, routing):
    model = build(model_class, tree=TREES[-1], routing=routing).eval()
    ids, mask = torch.randint(50, (4, 9)), torch.arange(9) < torch.tensor([9, 9, 6, 9])[:, None]
    plain = model(ids, attention_mask=mask, output_attentions=True, log_paths=True)
    biased = lambda bias: model(ids, attention_mask=mask, context_bias=bias).logits
    assert_close(biased(torch.zeros(32)), plain.logits)
    assert (biased(torch.randn(4, 1, 32)) - plain.logits).abs().max() > 1e-3
    assert len(plain.attentions) == 3
    for level in plain.attentions:
        assert_close(level[0].sum(-1), torch.ones(2, 9), msg="attention rows sum to one")
        assert level[2, :, :6, 6:].abs().max() == 0, "padding is not looked at"
    events = list(plain.path_log)
    facts = {"node_id", "depth", "action", "child_id", "compatibility", "threshold"}
    assert len(events) == len(plain.path_log) and set(events[0]) >= facts
    off = model(ids, attention_mask=mask)
    assert off.path_log is None and off.num_nodes is None and "path_log" not in off
    assert_close(off.logits, plain.logits)


@pytest.mark.parametrize("routing", ["sequence", "token"])
def test_asking_for_attention_changes_no_logit(routing):
    "Without padding a token-routed root has no mask; its weights must not be the causal ones."
    model, ids = perturbed(build(tree=TREES[-1], routing=routing)), torch.randint(50, (3, 9))
    asked = model(ids, output_attentions=True)
    assert_close(asked.logits, model(ids).logits)
    assert asked.attentions[0][:, :, 0, -1].min() > 0, "the first token looks at the last"


def part_ways(model, ids):
    "Give the root's two children keys between which the first two examples part."
    root, one, other = model.sprout.nodes[:3]
    states = model.sprout(ids, output_hidden_states=True).hidden_states[1]
    with torch.no_grad():
        _, (first, second, *_) = root.router(root.router.pool(states), torch.stack([one.key]))
        middle, across = first + second, first - second
        across = across - (across @ middle) / (middle @ middle) * middle
        one.key.copy_(across)
        other.key.copy_(-across)


@pytest.mark.parametrize("routing", ["sequence", "token"])
def test_hidden_states_of_every_level(routing):
    model = perturbed(build(tree=[-1, 0, 0, 1], routing=routing))
    ids = torch.randint(50, (6, 9))
    part_ways(model, ids)
    output = model.sprout(ids, output_hidden_states=True, log_paths=True)
    assert len(output.hidden_states) == 4 and "hidden_states" not in model.sprout(ids)
    assert_close(output.hidden_states[0], model.sprout.embed_tokens(ids))
    assert_close(output.hidden_states[-1], output.last_hidden_state)
    ended = output.path_log.paths()[-1] < 0   # whose path ended a level before keeps its states
    assert ended.any() and not ended.all()
    assert_close(output.hidden_states[2][ended], output.hidden_states[3][ended])
    assert len(model(ids, output_hidden_states=True).hidden_states) == 4


def test_a_text_can_be_traced():
    from sprout_lab.data.tokenizers import ByteTokenizer
    from sprout_lab.models.sprout import trace
    tokenizer = ByteTokenizer(masked=True)
    for routing in ("sequence", "token"):
        model = build(tree=TREES[-1], routing=routing, vocab_size=259).train()
        answer = trace(model, tokenizer, "to be")
        assert (model.training and answer["tokens"] == list("to be")
                and len(answer["attentions"]) == 3)
        paths = [answer["path"]] if routing == "sequence" else answer["path"]
        for number, path in enumerate(paths):
            assert path[0] == 0 and [TREES[-1][child] for child in path[1:]] == path[:-1]
            for router, child in zip(path, path[1:]):
                row = answer["compatibilities"][router]
                if routing == "token": row = row[number]
                assert max(row, key=row.get) == child
    with pytest.raises(ConfigError, match="empty"): trace(model, tokenizer, "")


# ---- growth -------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_class, routing", [
    (SproutForMaskedLM, "sequence"), (SproutForMaskedLM, "token"), (SproutForMaskedLM, "batch"),
    (SproutForCausalLM, "token")])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_limits_hold_under_any_threshold(model_class, routing, threshold):
    for max_nodes, max_depth in ((1, 3), (2, 0), (5, 2), (7, 1)):
        model = build(model_class, max_nodes=max_nodes, max_depth=max_depth, routing=routing,
                      compatibility_threshold=threshold).train()
        for _ in range(12):
            model(torch.randint(50, (4, 6)))
            model.grow(limit=3)
            nodes = model.sprout.nodes
            assert len(nodes) <= max_nodes and max(node.depth for node in nodes) <= max_depth
        # first children only
        if threshold == 0: assert len(nodes) == min(max_nodes, max_depth + 1)
        elif max_depth: assert len(nodes) == max_nodes
        assert model.get_model_info()["node_limit_reached"] == (len(nodes) == max_nodes)


def test_forward_is_pure_and_evaluation_never_grows():
    model = build(tree=TREES[-1], compatibility_threshold=1.0).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(**batch())
    assert model.grow() == [] and model.config.tree == TREES[-1]
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name]), name
    model.train()
    for _ in range(5): model(**batch())
    assert model.config.tree == TREES[-1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("model_class", [SproutForMaskedLM, SproutForCausalLM])
def test_growth_hardly_changes_the_function_and_is_trained(model_class):
    model = build(model_class, max_nodes=8, max_depth=2, compatibility_threshold=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, actions = torch.randint(50, (32, 10)), []
    for round in range(7):
        train(model, optimizer, 8, seed=100 * round)
        moments = {id(p): {k: v.clone() for k, v in state.items()}
                   for p, state in optimizer.state.items()}
        before = model.eval()(ids).logits
        events = model.train().grow(optimizer=optimizer, step=8 * round)
        events = [event for event in events if event.child_id is not None]
        if not events: break
        actions.append(events[0].action)
        after = model.eval()(ids).logits
        allowed = 0 if actions[-1] == "created_first_child" else 0.05
        assert (after - before).norm() <= allowed * before.norm()
        for p, state in optimizer.state.items():
            for key, value in state.items(): assert torch.equal(value, moments[id(p)][key])
        assert all(p not in optimizer.state for e in events for p in e.parameters.values())
        born = {name: p.clone() for e in events for name, p in e.parameters.items()}
        train(model, optimizer, 10, seed=1000 + round)
        for name, p in born.items():
            if name.endswith("weight") and not re.search("router|norm", name):
                assert not torch.equal(model.get_parameter(name), p), f"{name} was not trained"
    assert actions[:2] == ["created_first_child"] * 2 and "branched" in actions
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(set(map(id, grouped)))
    assert set(map(id, grouped)) == set(map(id, model.parameters()))


def test_new_parameters_join_the_groups_of_their_kind():
    from sprout_lab.configs import TrainingConfig
    from sprout_lab.trainers.optimizers import (
        build_optimizer, load_optimizer_tensors, optimizer_tensors)
    for kind in ("adamw", "muon"):
        settings = TrainingConfig(optimizer=kind, learning_rate=1e-3)
        model = build(compatibility_threshold=1.0, max_depth=1)
        optimizer = build_optimizer(model, settings)
        for round in range(3):
            train(model, optimizer, 3, 10 * round)
            model.grow(optimizer=optimizer)
        train(model, optimizer, 3)
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        anew = build_optimizer(model, settings)
        fresh = {id(p): g["weight_decay"] for g in anew.param_groups for p in g["params"]}
        assert decay == fresh
        twin = build(tree=model.config.tree, compatibility_threshold=1.0, max_depth=1, seed=5)
        twin.load_state_dict(model.state_dict())
        its = build_optimizer(twin, settings)
        load_optimizer_tensors(twin, its, optimizer_tensors(model, optimizer))
        for one, its_optimizer in ((model, optimizer), (twin, its)):
            train(one, its_optimizer, 3, seed=77)
        for (name, a), b in zip(model.named_parameters(), twin.parameters()):
            assert torch.equal(a, b), name


def test_a_copied_subtree_keeps_the_function():
    model = build(tree=[-1, 0, 1], max_nodes=5, compatibility_threshold=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, 20)
    before = model.eval()(ids := torch.randint(50, (32, 10))).logits
    event, = model.train().grow(parents=[0])
    assert (event.action, event.copied_from, model.config.tree) == ("branched", 1, [-1, 0, 1, 0, 3])
    after = model.eval()(ids, log_paths=True)
    assert (after.logits - before).norm() < 0.05 * before.norm()
    assert len(after.path_log.paths()[1].unique()) == 2, "the new child shares the traffic"


def test_pruning_and_merging():
    model = build(tree=[-1, 0, 0, 1, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    usage = model.sprout.usage()
    model.prune([1], optimizer=optimizer)
    assert model.config.tree == [-1, 0, 1] and model.sprout.usage() == [usage[i] for i in (0, 2, 5)]
    train(model, optimizer, 2)
    model.prune([1], optimizer=optimizer)
    assert model.config.tree == [-1] and model.sprout.nodes[0].router is None
    train(model, optimizer, 2)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters()}
    for wrong in ([0], [7]):
        with pytest.raises(ConfigError, match="the root stays"): model.prune(wrong)

    model = build(tree=[-1, 0], compatibility_threshold=1.0, max_depth=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 10)
    model.grow(optimizer=optimizer)
    before = model.eval()(ids := torch.randint(50, (16, 10))).logits
    model.train().merge(1, 2, optimizer=optimizer)
    assert model.config.tree == [-1, 0]
    assert (model.eval()(ids).logits - before).norm() < 0.05 * before.norm()
    assert [e["action"] for e in model.config.history] == ["branched", "merged"]
    with pytest.raises(ConfigError, match="cannot be merged"): model.merge(1, 1)


# ---- save and load, statistics, training --------------------------------------------------------
def test_save_and_load_a_grown_tree(tmp_path):
    model = build(max_nodes=6, compatibility_threshold=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for round in range(5):
        train(model, optimizer, 3, 10 * round)
        model.grow(optimizer=optimizer, step=3 * round)
    model.save_pretrained(tmp_path)
    twin = SproutForMaskedLM.from_pretrained(tmp_path)
    assert twin.config.tree == model.config.tree and twin.config.history == model.config.history
    assert twin.sprout.usage() == model.sprout.usage()
    assert torch.equal(twin.eval()(**batch()).logits, model.eval()(**batch()).logits)
    assert twin.get_model_info() == model.get_model_info()
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    # both grow on alike, and a fresh model can take over the shape
    for one in (model, twin): one.train()(**batch(seed=5)); one.grow(step=99)
    assert twin.config.tree == model.config.tree
    fresh = build(max_nodes=6, compatibility_threshold=1.0, seed=9)
    assert fresh.restore_tree(str(tmp_path)) and not fresh.restore_tree(str(tmp_path))
    saved = SproutForMaskedLM.from_pretrained(tmp_path)
    fresh.load_state_dict(saved.state_dict())
    assert fresh.sprout.usage() == saved.sprout.usage()


def test_overfits_one_batch_also_in_bf16_and_with_checkpointing():
    for mode in ("plain", "bf16", "checkpointing", "token"):
        model = build(tree=[-1, 0, 0], routing="token" if mode == "token" else None)
        if mode == "checkpointing": checkpoint_activations(model)
        optimizer, data = torch.optim.AdamW(model.parameters(), lr=1e-2), batch(4, 8)
        for _ in range(60):
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
                loss = model(**data).loss
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        assert loss < 0.3, (mode, loss)
    usage = model.sprout.usage()
    assert usage[0] == 60 * 32 and usage[1] + usage[2] == usage[0]


def test_checkpointing_gives_the_same_gradients_also_in_grown_nodes():
    gradients = []
    for checkpointing in (False, True):
        model = build(compatibility_threshold=1.0)
        if checkpointing: checkpoint_activations(model)
        model.train()
        for _ in range(3): model(**batch()); model.grow()
        model(**batch()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name in gradients[0]: assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_every_parameter_has_a_gradient_in_training():
    "Data parallel training waits for each of them; an idle node gets zeros."
    for routing in ("sequence", "token", "batch"):
        model = build(tree=TREES[-1], routing=routing)
        model(**batch(rows=1)).loss.backward()
        assert all(p.grad is not None for p in model.parameters()), routing


def test_structure_statistics_and_convergence(capsys):
    model = build(tree=TREES[-1])
    for node, usage in zip(model.sprout.nodes, (1500, 750, 750, 400, 350, 750)):
        node.usage.fill_(usage)
    model.visualize_structure()
    assert capsys.readouterr().out == textwrap.dedent("""\
        === SPROUT Structure ===
        └── Node 0 (depth=0, children=2, usage=1500)
            ├── Node 0 (depth=1, children=2, usage=750)
            │   ├── Node 0 (depth=2, children=0, usage=400)
            │   └── Node 1 (depth=2, children=0, usage=350)
            └── Node 1 (depth=1, children=1, usage=750)
                └── Node 0 (depth=2, children=0, usage=750)
        Total nodes: 6
        """)
    info = model.get_model_info()
    assert set(info) == {"total_nodes", "max_nodes", "node_limit_reached", "total_params",
                         "trainable_params", "sprout_stats"}
    assert info["sprout_stats"]["routing_entropy"][0] == 1.0
    assert model.sprout.get_structure()["children"][1]["children"][0]["usage"] == 750
    assert not model.sprout.is_converged()
    model.train()
    with torch.no_grad():
        for _ in range(30): model(**batch())
    assert model.sprout.is_converged(window=30) and not model.sprout.is_converged(window=31)


def test_the_guides_constructor():
    model = SproutLanguageModel(
        vocab_size=300, hidden_dim=64, max_depth=2, max_nodes=5, compatibility_threshold=0.8)
    config = model.config
    assert (config.hidden_size, config.num_attention_heads, config.dropout) == (64, 4, 0.1)
    assert config.max_position_embeddings == 512
    outputs = model(input_ids=torch.randint(300, (1, 9)))
    assert outputs["logits"].shape == (1, 9, 300) and len(outputs["path_log"]) == 0
    assert outputs["num_nodes"] == 1 == model.sprout.count_total_nodes()
    assert "loss" not in outputs and model(**batch()).loss > 0
    no_target = torch.full((1, 5), -100)
    assert model(torch.randint(300, (1, 5)),
                 labels=no_target).loss == 0, "no target, no loss, no NaN"
    with pytest.raises(ConfigError, match="did you mean 'max_nodes'"):
        SproutLanguageModel(vocab_size=9, max_node=3)
    quiet = SproutLanguageModel(vocab_size=300, hidden_dim=64, log_paths=False)
    assert "path_log" not in quiet(torch.randint(300, (1, 5)))


@pytest.mark.parametrize("size, millions",
                         [("nano", 1), ("mini", 10), ("small", 30), ("base", 100)])
def test_fully_grown_presets_have_the_size_they_promise(size, millions):
    known = SproutConfig.settings.model_fields
    fields = dict(canonical(n, v, known) for n, v in read_preset("sprout", size).items())
    config = SproutConfig(**{n: v for n, v in fields.items() if n in known})
    tree = [-1]
    while len(tree) < config.max_nodes:   # level by level, as evenly as it goes
        depths = tree_depths(tree)
        room = [i for i in range(len(tree)) if depths[i] < config.max_depth]
        tree.append(min(room, key=lambda i: (tree.count(i), i)))
    config.tree = tree
    with torch.device("meta"): model = SproutForMaskedLM(config)
    assert 0.85 < sum(p.numel() for p in model.parameters()) / (millions * 1e6) < 1.25


@pytest.mark.parametrize("fields", [
    dict(tree=[0]), dict(tree=[-1, 0, 5]), dict(max_nodes=0), dict(max_depth=-1),
    dict(num_attention_heads=3), dict(routing="both"), dict(hidden_dimm=3), dict(growth="always"),
    dict(mask_prob=0.0), dict(max_nodes=2, tree=[-1, 0, 0]), dict(compatibility_threshold="high"),
    dict(pad_token_id=50)], ids=str)
def test_a_wrong_configuration_is_one_line(fields):
    with pytest.raises(ConfigError) as caught: SproutConfig(**{**SHAPE, **fields})
    assert "\n" not in str(caught.value)


GREW = {"node_id": 0, "depth": 0, "action": "created_first_child", "child_id": 1, "step": 10,
        "threshold": 0.8, "tree": [-1, 0], "usage": [80, 0]}


@pytest.mark.parametrize("event, words", [
    ("grown", "is 'grown'"), ({}, "has no node_id"), ({**GREW, "action": "grew"}, "action='grew'"),
    ({**GREW, "mood": "good"}, "unknown fact 'mood'"), ({**GREW, "step": "ten"}, "step='ten'"),
    ({**GREW, "step": True}, "step=True"), ({**GREW, "child_id": -1}, "child_id=-1"),
    ({**GREW, "usage": [80]}, "usage"), ({**GREW, "usage": [80, "0"]}, "usage"),
    ({**GREW, "tree": [-1, 5]}, "an earlier node")], ids=str)
def test_a_history_that_growth_did_not_write_is_refused(event, words):
    SproutConfig(history=[GREW])
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        SproutConfig(history=[GREW, event])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError): SproutConfig().history = [event]


def test_wrong_input_is_one_line():
    model, causal = build(), build(SproutForCausalLM)
    with pytest.raises(ConfigError, match="sees at most"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ConfigError, match="must cover both"):
        model(torch.zeros(1, 5, dtype=torch.long), attention_mask=torch.ones(1, 4))
    from transformers import DynamicCache
    with pytest.raises(ConfigError, match="keeps its past in a SproutCache"):
        causal(torch.zeros(1, 5, dtype=torch.long), past_key_values=DynamicCache())


def test_a_sharded_tree_refuses_to_grow(monkeypatch):
    model = build().train()
    monkeypatch.setattr(torch.nn.Parameter, "device_mesh", object(), raising=False)
    with pytest.raises(ConfigError, match="sharded"): model.grow()


# ---- as its users' tools expect -----------------------------------------------------------------
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A masked and a causal tree of six nodes over bytes, each with its folder."
    import sprout_lab.families   # noqa: F401 (makes the models known to the Auto classes)
    saved = {}
    for name, model_class in (("masked", SproutForMaskedLM), ("causal", SproutForCausalLM)):
        model = perturbed(build(model_class, tree=TREES[-1], vocab_size=259))
        saved[name] = model, tmp_path_factory.mktemp(name)
        model.save_pretrained(saved[name][1])
    return saved


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_an_output_begins_with_loss_and_logits(folders, name):
    model, ids = folders[name][0], torch.randint(250, (2, 9))
    named = model(ids, labels=ids, output_hidden_states=True, log_paths=True)
    assert named[0] is named.loss and named[1] is named.logits
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    assert torch.equal(model(ids, return_dict=False)[0], named.logits)


def test_a_pipeline_fills_masks_in_batches(folders):
    from transformers import pipeline
    from sprout_lab.data.tokenizers import ByteTokenizer
    model, _ = folders["masked"]
    texts = ["To be, or<mask>not", "O Rom<mask>o", "<mask>nce"]
    fill = pipeline("fill-mask", model=model, tokenizer=ByteTokenizer(masked=True))
    one, two = (fill(texts, batch_size=size) for size in (1, 2))
    tokens = lambda answers: [[guess["token"] for guess in answer] for answer in answers]
    assert tokens(one) == tokens(two) and len(one) == 3


def test_a_folder_of_before_does_not_log_every_path(folders, tmp_path):
    "Its configuration says `log_paths`, as all did then; no one had asked."
    model, saved = folders["masked"]
    shutil.copytree(saved, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    content = json.loads(path.read_text()) | {"log_paths": True}
    path.write_text(json.dumps(content))
    assert SproutConfig.from_pretrained(tmp_path / "old").log_paths        # today someone asked
    del content["is_decoder"]
    path.write_text(json.dumps(content))
    assert not SproutConfig.from_pretrained(tmp_path / "old").log_paths
    assert SproutConfig.from_dict({"log_paths": True}).log_paths


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_transformers_trainer_evaluates(folders, name, tmp_path):
    from transformers import Trainer, TrainingArguments
    model, ids = folders[name][0], torch.randint(250, (6, 9))
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, eval_dataset=rows,
                      compute_metrics=lambda found: {"shape": list(found.predictions.shape)})
    scores = trainer.evaluate()
    assert scores["eval_shape"] == [6, 9, 259]
    assert abs(scores["eval_loss"] - model(ids, labels=ids).loss.item()) < 1e-4


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_auto_model_loads_the_tree_without_its_head(folders, name, tmp_path):
    from transformers import AutoModel
    model, folder = folders[name]
    ids = torch.randint(250, (2, 9))
    states = model.sprout(ids).last_hidden_state
    tree = AutoModel.from_pretrained(folder).eval()
    assert isinstance(tree, SproutModel) and tree.causal == (name == "causal")
    assert_close(tree(ids).last_hidden_state, states)
    tree.save_pretrained(tmp_path)   # a tree alone, saved again, still knows whether it looks ahead
    assert_close(AutoModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state, states)
    config = json.loads((folder / "config.json").read_text())
    del config["is_decoder"]         # and so does a checkpoint of before it was written
    (folder / "config.json").write_text(json.dumps(config))
    assert AutoModel.from_pretrained(folder).causal == (name == "causal")


@pytest.mark.parametrize("name", ["masked", "causal"])
@pytest.mark.parametrize("device_map", [{"": "disk"}, "auto"], ids=["disk", "auto"])
def test_weights_may_stay_on_a_disk(folders, name, device_map, tmp_path):
    "accelerate fetches a node's weights when the node runs; its key is asked for by the parent."
    model, folder = folders[name]
    options = {"max_memory": {"cpu": 100_000}} if device_map == "auto" else {}
    away = type(model).from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path), **options)
    assert any(p.device.type == "meta" for p in away.parameters())
    ids = torch.randint(250, (3, 9))
    assert_close(away(ids).logits, model(ids).logits)
    if name == "masked": return
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(away.generate(ids, **options), model.generate(ids, **options))


def test_assisted_decoding_and_prompt_lookup(folders):
    "What was guessed wrong is taken back out of every node's cache."
    model, _ = folders["causal"]
    ids = torch.randint(250, (1, 5)).repeat(1, 3)
    options = dict(max_new_tokens=12, do_sample=False)
    greedy = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=3), greedy)
    assistant = perturbed(build(SproutForCausalLM, seed=3, vocab_size=259, tree=[-1, 0]))
    for helper in (assistant, model):
        assert torch.equal(model.generate(ids, **options, assistant_model=helper), greedy)


def test_a_cache_is_cut_trimmed_and_joined():
    model = perturbed(build(SproutForCausalLM, tree=TREES[-1]))
    ids = torch.randint(49, (2, 8))
    cache = model.make_cache()
    model(ids, past_key_values=cache)
    cache.crop(-3)
    assert_close(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:])

    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids], 1)   # two columns of padding …
    mask = (torch.arange(10) > 1).long().expand(2, 10)
    cache = model.make_cache()
    model(padded, attention_mask=mask, past_key_values=cache)
    cache.trim(2)                                                      # … that are forgotten
    more = torch.randint(49, (2, 1))
    whole = model(torch.cat([ids, more], 1)).logits[:, -1:]
    positions = torch.full((2, 1), 8)
    found = model(more, attention_mask=torch.ones(2, 9), position_ids=positions,
                  past_key_values=cache.fork())
    assert_close(found.logits, whole)

    short = model.make_cache()                                         # a shorter text joins
    model(ids[:, :3], past_key_values=short)
    long = model.make_cache()
    model(ids, past_key_values=long)
    long.join(short)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[2:, :5] = 0
    found = model(more.repeat(2, 1), attention_mask=mask, past_key_values=long).logits
    assert_close(found[:2], whole)
    assert_close(found[2:], model(torch.cat([ids[:, :3], more], 1)).logits[:, -1:])


def test_peft_knows_where_to_adapt():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build(SproutForCausalLM, tree=[-1, 0]), peft.LoraConfig())
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    adapted(**batch()).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)


# ---- two processes ------------------------------------------------------------------------------
TWO = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
from test_sprout import batch, build
from sprout_lab.models.shared_batch import batch_shared_by
processes = int(os.environ.get("WORLD_SIZE", 1))
if processes > 1: dist.init_process_group("gloo")
rank = dist.get_rank() if processes > 1 else 0
model = build(compatibility_threshold=1.0, max_nodes=5, router_balance=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
wrapped = DistributedDataParallel(model) if processes > 1 else model
for step in range(24):
    whole = batch(rows=8, seed=step)
    rows = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    labels = whole["labels"]
    with batch_shared_by(processes):
        out = wrapped(input_ids=whole["input_ids"][rows], labels=labels[rows])
    optimizer.zero_grad(); out.loss.backward(); optimizer.step()
    if step % 5 == 4:
        events = model.grow(optimizer=optimizer, step=step)
        grown = any(event.child_id is not None for event in events)
        if grown and processes > 1: wrapped = DistributedDataParallel(model)
model.sprout.sync()
sums = [round(p.double().abs().sum().item(), 4) for p in model.parameters()]
actions = [event["action"] for event in model.config.history]
mine = model.config.tree, model.sprout.usage(), sums, actions
every = [mine] * processes
if processes > 1: dist.all_gather_object(every, mine)
assert all(e == every[0] for e in every), every
if rank == 0: print("RESULT", every[0])
if processes > 1: dist.destroy_process_group()
"""


def test_two_processes_grow_the_same_tree_as_one(tmp_path):
    script = tmp_path / "grow.py"
    script.write_text(TWO.format(tests=os.path.dirname(__file__)))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
              "2"]
    done = subprocess.run([*launch, str(script)], env=env, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with contextlib.redirect_stdout(io.StringIO()) as alone: exec(script.read_text(), {})
    printed = alone.getvalue(), done.stdout
    results = [ast.literal_eval(words.split("RESULT")[1].strip()) for words in printed]
    (tree, usage, sums, actions), (tree2, usage2, sums2, actions2) = results
    assert tree == tree2 and actions == actions2 and len(tree) == 5
    assert usage == usage2
    assert_close(torch.tensor(sums2), torch.tensor(sums), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("objective, routing", [("masked", "sequence"), ("masked", "token"),
                                                ("causal", "token"), ("causal", None)])
def test_pictures_of_every_routing(objective, routing):
    from sprout_lab.data.tokenizers import ByteTokenizer
    from sprout_lab.families import get_family
    family = get_family("sprout")
    model = family.build(objective=objective, hidden_size=16, num_attention_heads=2, max_nodes=5,
                         routing=routing, vocab_size=259).train()
    for _ in range(2): model.grow(parents=[0])
    model.eval()
    text = "What is the night? Almost at odds with morning, which is which. " * 30
    for name in ("tree", "compatibility"):
        assert len(family.draw(name, model, ByteTokenizer(masked=True), text).png()) > 1000
