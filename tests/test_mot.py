"""The mixture of thoughts: what its specification asks for, one test for each line."""
import math
import shutil

import pytest
import torch
from laws import check_laws, perturbed, random_ids

from sprout_lab.configs import ConfigError
from sprout_lab.data.corpora import load_corpus
from sprout_lab.families import configure, get_family, load_model, make_trainer
from sprout_lab.models import mot
from sprout_lab.models.mot import (MoTConfig, MoTForCausalLM, generate_parallel_thoughts,
                                   grouped_linear, pairwise_similarity, upcycle)
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM
from sprout_lab.trainers.optimizers import build_optimizer, parameter_groups
from sprout_lab.trainers.thoughts import branch_use, dead_branches
from sprout_lab.configs import TrainingConfig

SHAPE = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=48, max_position_embeddings=64)


def mixture(seed: int = 0, **fields) -> MoTForCausalLM:
    torch.manual_seed(seed)
    return MoTForCausalLM(MoTConfig(**{**SHAPE, **fields}))


def batches(count: int, seed: int = 0, rows: int = 6, length: int = 40):
    "Random windows of Shakespeare as ids `(rows, length)`."
    text = "".join(load_corpus("shakespeare").documents("train"))[:200_000].encode()
    ids, generator = torch.tensor(list(text)), torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(ids) - length, (rows,), generator=generator).tolist()
        yield torch.stack([ids[start:start + length] for start in starts])


def train(model, steps: int, seed: int = 0):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train()
    torch.manual_seed(seed)
    for ids in batches(steps, seed):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("fields", [{}, {"thoughts_per_token": 1}, {"activation": "gelu"},
                                    {"thoughts_per_token": 3, "num_key_value_heads": 1},
                                    {"activation": "gelu", "mlp_bias": True,
                                     "position": "learned", "norm_type": "layernorm"}])
def test_the_three_laws_in_every_form(fields): check_laws(mixture(**fields))


def test_evaluation_is_deterministic_and_creativity_is_seeded():
    model, ids = perturbed(mixture()), random_ids(mixture(), 2, 16)
    with torch.no_grad():
        once, again = model(ids).logits, model(ids).logits
        assert torch.equal(once, again)
        with model.creative(1.0, seed=3): wild = model(ids).logits
        with model.creative(1.0, seed=3): same = model(ids).logits
        with model.creative(1.0, seed=4): other = model(ids).logits
        assert torch.equal(wild, same) and not torch.equal(wild, other)
        assert torch.equal(model(ids).logits, once)              # and it is calm afterwards
        before = torch.get_rng_state()
        with model.creative(1.0, seed=3): model(ids)
        assert torch.equal(torch.get_rng_state(), before)        # the global generator is not used
    model.config.noise_scale = 0.0
    with torch.no_grad(), model.creative(1.0, seed=3): assert torch.equal(model(ids).logits, once)


def test_the_diversity_loss_has_a_gradient_and_lowering_it_lowers_likeness():
    model = mixture(num_thoughts=4, noise_scale=0.0)
    ids = next(batches(1))
    model.train()
    first = model(ids, labels=ids).diversity_loss
    grads = torch.autograd.grad(first, [layer.mlp.branches.down for layer in model.model.layers])
    assert all(g.abs().sum() > 0 for g in grads)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(15):
        output = model(ids, labels=ids)
        optimizer.zero_grad()
        output.diversity_loss.backward()
        optimizer.step()
    assert model(ids, labels=ids).diversity_loss < first - 0.1


def test_the_loss_is_the_sum_that_the_settings_say():
    model, ids = mixture(noise_scale=0.0, diversity_weight=0.3, entropy_weight=0.2,
                         balance_weight=0.1), next(batches(1))
    model.train()
    output = model(ids, labels=ids)
    model.eval()
    plain = model(ids, labels=ids).loss
    added = (0.3 * output.diversity_loss - 0.2 * output.router_entropy
             + 0.1 * output.balance_loss)
    assert abs((output.loss - plain - added).item()) < 1e-5
    assert 0 < output.router_entropy <= math.log(8) + 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_branches_are_alive_after_200_steps(seed):
    model = train(mixture(seed), 200, seed)
    use = branch_use(model, batches(2, seed=9))
    assert not dead_branches(use["load"], least=0.1), use
    ids = next(batches(1, seed=9))
    with torch.no_grad(): load = model(ids).thought_load
    assert (load > 0).all(), "a branch of some layer gets no token"


def test_compute_grows_with_the_chosen_branches_and_not_with_all():
    def products(**fields):
        model, ids = mixture(**fields).eval(), torch.zeros(4, 32, dtype=torch.long)
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter, torch.no_grad(): model(ids)
        return counter.get_total_flops()
    two, four = products(num_thoughts=8), products(num_thoughts=8, thoughts_per_token=4)
    many = products(num_thoughts=64)
    router = 2 * 4 * 32 * 32 * (64 - 8) * 2                      # its scores grow, nothing else
    assert many == two + router and four > 1.3 * two


def test_a_branch_without_tokens_is_no_special_case():
    weight = torch.randn(4, 5, 6, requires_grad=True)
    rows = torch.randn(3, 6)
    grouped_linear(rows, weight, [0, 3, 0, 0]).sum().backward()
    assert weight.grad[1].abs().sum() > 0 and weight.grad[[0, 2, 3]].abs().sum() == 0
    assert grouped_linear(rows[:0], weight, [0, 0, 0, 0]).shape == (0, 5)
    assert torch.equal(pairwise_similarity(torch.randn(3, 1, 4)), torch.zeros(3))


def loss_and_gradients(model, ids, bf16: bool = False):
    "Loss in training, and the gradient of every weight of the branches."
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16): loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()
                           if p.grad is not None}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fields", [{}, {"activation": "gelu", "mlp_bias": True}])
def test_the_loops_in_c_are_the_definition(monkeypatch, fields, bf16):
    model, ids = perturbed(mixture(noise_scale=0.0, **fields)).float().train(), next(batches(1))
    branches = model.model.layers[0].mlp.branches
    if not any(map(shutil.which, ("cc", "gcc", "clang"))): pytest.skip("no C compiler")
    assert mot.fused_thoughts_run(torch.zeros(1, 32), branches.up)
    fused, found = loss_and_gradients(model, ids, bf16)
    monkeypatch.setattr(mot, "fused_thoughts_run", lambda x, weight: False)
    plain, wanted = loss_and_gradients(model, ids, bf16)
    near = 0.05 if bf16 else 1e-4
    assert abs(fused - plain) < near and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        distance = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert distance < near * 3, name


def test_the_noise_of_the_loops_repeats_and_two_threads_add_up_the_same():
    model, ids = perturbed(mixture(hidden_size=64)).float().train(), next(batches(1, rows=24))
    first, once = loss_and_gradients(model, ids)
    again, twice = loss_and_gradients(model, ids)
    assert first == again and all(torch.equal(once[name], twice[name]) for name in once)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, shared = loss_and_gradients(model, ids)
    finally: torch.set_num_threads(threads)
    for name, gradient in once.items():
        assert torch.allclose(shared[name], gradient, rtol=1e-3, atol=1e-5), name


def test_parallel_thoughts_are_one_batch_and_repeat_from_a_seed():
    model, prompt = mixture().eval(), torch.arange(5)
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(output.logits.shape[0]))
    trains = generate_parallel_thoughts(model, prompt, num_parallel=4, max_length=20, seed=1)
    assert trains.ids.shape == (4, 20) and torch.equal(trains.ids[:, :5], prompt.expand(4, 5))
    assert passes == [4] * 15                                    # one pass for each new token
    assert trains.creativity.tolist() == [0, 0.5, 1.0, 1.5]
    assert torch.allclose(trains.thought_load.sum(1), torch.ones(4))
    again = generate_parallel_thoughts(model, prompt[None], num_parallel=4, max_length=20, seed=1)
    assert torch.equal(again.ids, trains.ids)
    for wrong in (dict(num_parallel=0), dict(max_length=5)):
        with pytest.raises(ConfigError): generate_parallel_thoughts(model, prompt, **wrong)


@pytest.mark.parametrize("fields", [
    {}, {"activation": "gelu"}, {"tie_word_embeddings": True},
    {"activation": "gelu", "mlp_bias": True, "attention_bias": True, "position": "learned",
     "norm_type": "layernorm"}])
def test_upcycling_leaves_the_logits_and_then_learns(fields):
    torch.manual_seed(0)
    plain = perturbed(TransformerForCausalLM(TransformerConfig(**SHAPE, **fields)))
    with torch.no_grad():
        for p in plain.parameters(): p.add_(0.02 * torch.randn_like(p))
    model, ids = upcycle(plain, num_thoughts=4).double(), random_ids(plain, 2, 20)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    ids = next(batches(1))
    model.float().train()
    before = model(ids, labels=ids).loss
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(8):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).loss < before - 0.3


def test_upcycling_refuses_what_has_no_such_form():
    silu = TransformerForCausalLM(TransformerConfig(**SHAPE, activation="silu"))
    with pytest.raises(ConfigError, match="swiglu or gelu"): upcycle(silu)


@pytest.mark.parametrize("wrong, words", [
    (dict(thoughts_per_token=9), "above num_thoughts=8"),
    (dict(num_thoughts=0), "num_thoughts=0"), (dict(noise_scale=-1), "noise_scale=-1"),
    (dict(norm="post"), "pre-norm"), (dict(num_thougts=4), "did you mean 'num_thoughts'"),
    (dict(thought_history=[{"step": 0, "entropy": "x", "similarity": 0, "load": []}]),
     "training writes it")])
def test_wrong_settings_are_one_line(wrong, words):
    with pytest.raises(ConfigError, match=words) as error: MoTConfig(**{**SHAPE, **wrong})
    assert "\n" not in str(error.value)


def test_creativity_of_a_wrong_shape_is_one_line():
    with pytest.raises(ConfigError, match="one for each of 2 rows"):
        mixture()(torch.zeros(2, 4, dtype=torch.long), creativity=torch.ones(3))


def test_the_optimizer_takes_branches_for_matrices_and_their_tables_for_vectors():
    model = mixture(activation="gelu", mlp_bias=True)
    kinds = {name: kind for kind, named in parameter_groups(model).items() for name, _ in named}
    prefix = "model.layers.0.mlp.branches."
    assert kinds[prefix + "up"] == kinds[prefix + "down"] == "matrices"
    for name in ("gain", "shift", "freedom", "up_bias"): assert kinds[prefix + name] == "vectors"
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, TrainingConfig(optimizer=name, learning_rate=0.01))
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in dict.fromkeys(model.parameters()))


def test_history_goes_with_the_checkpoints_and_is_cut_when_a_run_goes_back(tmp_path):
    flags = {**SHAPE, "max_steps": 8, "batch_size": 2, "sequence_length": 32, "eval_interval": 2,
             "eval_batches": 1, "final_eval_batches": 0, "save_interval": 2, "sample_tokens": 0,
             "keep_checkpoints": 9, "tensorboard": False, "device": "cpu"}
    flags.pop("vocab_size")
    quiet = lambda line: None
    folder = tmp_path / "run"
    make_trainer(configure("mot", {**flags, "output_dir": str(folder)}), log=quiet).train()
    model, tokenizer = load_model(folder / "checkpoints/latest", log=quiet)
    assert [entry["step"] for entry in model.config.thought_history] == [0, 2, 4, 6, 8]
    again = make_trainer(configure("mot", {"resume_from": str(folder / "checkpoints/step_4"),
                                           "output_dir": str(tmp_path / "again")}), log=quiet)
    assert [e["step"] for e in again.model.config.thought_history] == [0, 2, 4]
    again.train()
    assert again.model.config.thought_history == model.config.thought_history
    figure = get_family("mot").draw("branch_load", model, tokenizer, "To be")
    assert len(figure.axes) == 2


def test_it_trains_in_bf16():
    model, ids = mixture().train(), next(batches(1))
    with torch.autocast("cpu", torch.bfloat16): loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters()
                                        if p.grad is not None)
