"""The search: its values, its choices, its costs, for every causal family of the register."""
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from shell import refused

from sprout_lab.configs import ConfigError
from sprout_lab.data.series import SampleEncoder, SeriesSample, collate
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.decoding.branches import MeteredEngine, make_store
from sprout_lab.decoding.rewards import RewardError, batched, make_reward
from sprout_lab.decoding.search import METHODS, compare, search
from sprout_lab.decoding.search_tree import all_nodes, choose, path_of, soft_value, tilt
from sprout_lab.families import families
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM

TREES = ("mcts", "dts", "dts*", "s-adt")
CAUSAL = [name for name, family in families.items() if "causal" in family.models]


def tiny(vocab_size: int = 256, seed: int = 0, scale: float = 4.0, **fields):
    "A small Transformer whose predictions are far from even."
    torch.manual_seed(seed)
    fields = {"num_hidden_layers": 2, "hidden_size": 32, "max_position_embeddings": 256, **fields}
    model = TransformerForCausalLM(TransformerConfig(vocab_size=vocab_size, **fields)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(scale * 0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model(): return tiny()


@pytest.fixture(scope="module")
def tokenizer(): return ByteTokenizer()


def low_bytes(prompt, text): return sum(ord(letter) % 7 == 0 for letter in text) / 8


@pytest.mark.parametrize("expand", ("sample", "topk"))
@pytest.mark.parametrize("method", ("dts", "dts*", "s-adt", "mcts"))
def test_a_constant_reward_is_every_nodes_value(model, tokenizer, method, expand):
    for rollouts, lam in itertools.product((10, 50, 200), (1e-3, 1.0, 1e3)):
        found = search(model, tokenizer, "ab", lambda prompt, text: 0.5, method=method, lam=lam,
                       rollouts=rollouts, max_new_tokens=4, expand=expand)
        visited = [node for node in all_nodes(found.root) if node.value is not None]
        assert found.root.visits == rollouts and len(visited) > 3
        assert {node.value for node in visited} == {0.5}


@pytest.mark.parametrize("method", TREES)
@pytest.mark.parametrize("lam", (1e-3, 1.0, 30.0, 1e3))
def test_values_lie_between_the_rewards(model, tokenizer, method, lam):
    found = search(model, tokenizer, "ab", low_bytes, method=method, lam=lam, rollouts=60,
                   max_new_tokens=8, widening=0.3)
    rewards = [completion.reward for completion in found.completions]
    for node in all_nodes(found.root):
        if node.value is not None: assert min(rewards) - 1e-12 <= node.value <= max(rewards) + 1e-12
        assert (node.value is not None) == (node.visits > 0)


def test_values_are_those_of_the_equation(model, tokenizer):
    found = search(model, tokenizer, "ab", low_bytes, lam=3.0, rollouts=80, max_new_tokens=8)
    inner = 0
    for node in all_nodes(found.root):
        visited = [child for child in node.children if child.value is not None]
        if not visited: continue
        inner += 1
        weights = np.array([child.prior for child in visited])
        expected = np.log((weights / weights.sum()
                           * np.exp(3.0 * np.array([c.value for c in visited]))).sum()) / 3.0
        assert node.value == pytest.approx(expected, abs=1e-9)
        assert node.visits == sum(child.visits for child in node.children)
    assert inner > 5
    assert found.nodes == 1 + sum(len(node.children) for node in all_nodes(found.root))


def test_draws_come_from_the_model(model, tokenizer):
    found = search(tiny(vocab_size=6), None, [1, 2], lambda prompt, ids: sum(ids) / 20, lam=5.0,
                   rollouts=2000, max_new_tokens=4, widening=0.8)
    for node in all_nodes(found.root):
        assert node.draws == sum(child.drawn for child in node.children)
        if node.draws < 500: continue
        exact = node.log_probs.double().exp()
        for child in node.children:
            assert child.prior == pytest.approx(float(exact[child.token]), abs=0.08)
    assert found.root.draws > 1000


def test_soft_values_do_not_overflow():
    random = np.random.default_rng(0)
    for lam in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        weights, values = random.random(9) ** 8, random.normal(size=9) * 1e3
        value = soft_value(weights, values, lam)
        assert values.min() <= value <= values.max() and np.isfinite(tilt(weights, values,
                                                                          lam)).all()
    assert soft_value(weights, values, 1e-6) == pytest.approx(weights @ values / weights.sum(),
                                                              rel=1e-2, abs=2)


def test_without_lambda_the_prior_decides(model, tokenizer):
    found = search(model, tokenizer, "ab", low_bytes, lam=1e-6, rollouts=200, max_new_tokens=3,
                   expand="topk", expansion_k=5)
    root, random = found.root, np.random.default_rng(0)
    priors = np.array([child.prior for child in root.children])
    exact = root.log_probs.double().exp().topk(5).values.numpy()
    assert priors == pytest.approx(exact, rel=1e-6)
    drawn = [root.children.index(choose(root, "boltzmann", 1e-6, 1.0, random))
             for _ in range(20000)]
    shares = np.bincount(drawn, minlength=5) / 20000
    assert np.abs(shares - priors / priors.sum()).max() < 0.015
    drawn = {choose(root, "boltzmann", 1e6, 1.0, random).value for _ in range(200)}
    assert drawn == {max(child.value for child in root.children)}          # λ → ∞: the maximum


@pytest.mark.parametrize("method", METHODS)
def test_the_reward_that_is_returned_is_the_texts_own(model, tokenizer, method):
    found = search(model, tokenizer, "ab", low_bytes, method=method, rollouts=20, max_new_tokens=8)
    assert low_bytes("ab", found.text) == found.reward == max(c.reward for c in found.completions)
    ended = found.ids[-1] == tokenizer.eos_token_id
    assert len(found.ids) == 8 or ended
    assert tokenizer.decode(found.ids[:-1] if ended else found.ids) == found.text
    assert sum(weight for _, weight in found.samples) == pytest.approx(1)
    with torch.no_grad():
        ids = tokenizer.encode("ab") + found.ids
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(log_probs[i + 1, token]) for i, token in enumerate(found.ids))
    assert found.logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(model, tokenizer, method):
    def once(seed):
        found = search(model, tokenizer, "ab", low_bytes, method=method, rollouts=40, seed=seed,
                       max_new_tokens=6)
        return [c.ids for c in found.completions], found.samples, [n.value for n in
                                                                   all_nodes(found.root)]
    assert once(3) == once(3)
    if method not in ("greedy", "beam"): assert once(3) != once(4)


@pytest.mark.parametrize("method", METHODS)
def test_an_end_token_ends_a_text(tokenizer, method):
    model, end = tiny(), tokenizer.eos_token_id
    found = search(model, tokenizer, "ab", lambda prompt, text: -len(text), method=method,
                   rollouts=60, max_new_tokens=12, expansion_k=30, temperature=3.0)
    for completion in found.completions:
        assert end not in completion.ids[:-1]
        assert len(completion.text) <= len(completion.ids) - (completion.ids[-1] == end)
        assert completion.ids[-1] == end or len(completion.ids) == 12
    for node in all_nodes(found.root):
        if node.token == end: assert not node.children
    if method in TREES: assert any(c.ids[-1] == end for c in found.completions)


class Counting(torch.nn.Module):
    "A model that counts for itself what it reads."

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device, self.calls, self.tokens = (model, model.config, "cpu",
                                                                         0, 0)

    def can_generate(self): return True
    def make_cache(self, *args): return self.model.make_cache(*args)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=None, logits_to_keep=0):
        self.calls, self.tokens = self.calls + 1, self.tokens + input_ids.numel()
        return self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids,
                          past_key_values=past_key_values, use_cache=use_cache,
                          logits_to_keep=logits_to_keep)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", (7, 50, 333))
def test_a_budget_is_never_exceeded_and_counted_truly(model, tokenizer, method, budget):
    counting = Counting(model)
    found = search(counting, tokenizer, "abcdefgh", low_bytes, method=method, rollouts=1000,
                   max_new_tokens=8, token_budget=budget)
    cost = found.cost
    assert counting.tokens == cost.tokens_evaluated + cost.prefix_tokens
    assert counting.calls == cost.forward_calls
    assert cost.tokens_evaluated <= budget and cost.prefix_tokens == 8
    if method not in ("greedy", "sample"): assert cost.tokens_evaluated > 0.5 * budget


def test_a_rollout_reads_no_more_than_its_new_tokens(model, tokenizer):
    for method in METHODS:
        found = search(model, tokenizer, "a" * 100, low_bytes, method=method, rollouts=50,
                       max_new_tokens=20)
        assert found.cost.prefix_tokens == 100
        assert found.cost.tokens_evaluated <= 50 * 20
        if method in TREES: assert found.root.visits == 50


def walk_from(engine, root, whole, capacity: int = 128, nodes: int = 12) -> float:
    """Grow a tree of states from a prompt's in random order; the largest difference to
    `whole(text)`, the logits after reading the prompt and a text at once."""
    random, worst, store = np.random.default_rng(0), 0.0, make_store(engine, root, capacity)
    texts, places = [()], [()]
    for _ in range(nodes):
        rows = random.integers(0, len(texts), random.integers(1, 5)).tolist()
        tokens = random.integers(0, engine.model.config.vocab_size, len(rows)).tolist()
        parents = [places[row] for row in rows]
        state = engine.step(store.load(parents), tokens)
        places += store.save(state, parents)
        texts += [texts[row] + (token,) for row, token in zip(rows, tokens)]
        with torch.no_grad():
            for text, logits in zip(texts[-len(rows):], state.logits):
                worst = max(worst, float((logits - whole(text)).abs().max()))
    assert max(map(len, texts)) > 2
    return worst


def walk_in_random_order(model) -> float:
    "`walk_from` a prompt of ids."
    prompt = np.random.default_rng(1).integers(0, model.config.vocab_size, 9).tolist()
    engine = MeteredEngine(model)
    return walk_from(engine, engine.read_prompt(prompt, 32),
                     lambda text: model(torch.tensor([prompt + list(text)])).logits[0, -1], 32)


@pytest.mark.parametrize("family", CAUSAL)
def test_cached_is_uncached_in_any_order(family):
    torch.manual_seed(0)
    model = families[family].build(vocab_size=64, objective="causal").eval()
    assert walk_in_random_order(model) < 1e-4


def series_model(form: str = "soft_prompt"):
    "A small model that reads series, its weights far from even."
    torch.manual_seed(0)
    model = families["tslm"].build(form=form, hidden_size=32, num_hidden_layers=2,
                                   num_attention_heads=2, encoder_num_layers=1).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model


def question(order: int = 1) -> SeriesSample:
    """Two series in words and numbers; `order` -1: each of them backwards, which leaves its mean, its
    deviation and so every word of the prompt as they are."""
    values = [np.sin(np.arange(19) / 2) + np.arange(19) / 9, np.arange(12.0) ** 2]
    return SeriesSample("Look.", ["one", "two"], [v[::order].copy() for v in values], "Which?")


@pytest.mark.parametrize("form", ("soft_prompt", "flamingo"))
def test_a_search_reads_its_series(form, tokenizer):
    model = series_model(form)
    search_of = lambda prompt: search(model, tokenizer, prompt, low_bytes, rollouts=12,
                                      max_new_tokens=5, batch_size=4)
    found, again, backwards = map(search_of, (question(), question(), question(-1)))
    assert found.root.visits == 12 and low_bytes("", found.text) == found.reward
    assert found.cost.tokens_evaluated <= 12 * 5 and found.samples == again.samples
    difference = found.root.log_probs - backwards.root.log_probs
    assert float(difference.abs().max()) > 1e-2
    encoder = SampleEncoder(tokenizer, 4, form == "soft_prompt")
    read = [len(encoder.encode(question(order), answer=False).ids) for order in (1, -1)]
    assert [found.cost.prefix_tokens, backwards.cost.prefix_tokens] == read


def test_a_series_may_be_embeddings_and_zeroing_it_changes_the_root(tokenizer):
    model = series_model()
    row = SampleEncoder(tokenizer).encode(question(), answer=False)
    batch = collate([row])
    given = {name: batch[name] for name in ("input_ids", "patch_places", "series_lengths")}
    with torch.no_grad():
        embeds = model.embed(series=batch["series"], **given)
        zeroed = model.embed(series=torch.zeros_like(batch["series"]), **given)
    found = [search(model, tokenizer, prompt, low_bytes, rollouts=12, max_new_tokens=5)
             for prompt in (question(), embeds, zeroed)]
    assert torch.allclose(found[0].root.log_probs, found[1].root.log_probs, atol=1e-4)
    assert float((found[0].root.log_probs - found[2].root.log_probs).abs().max()) > 1e-2


@pytest.mark.parametrize("form", ("soft_prompt", "flamingo"))
def test_cached_is_uncached_after_series(form, tokenizer):
    model, sample = series_model(form), question()
    row = SampleEncoder(tokenizer, 4, form == "soft_prompt").encode(sample, answer=False)

    def whole(text):
        places = row.is_patch + [False] * len(text)
        longer = row._replace(ids=row.ids + list(text), is_patch=places,
                              targets=[-100] * len(places))
        batch = collate([longer])
        batch.pop("shift_labels")
        return model(**batch, use_cache=False).logits[0, -1]
    engine = MeteredEngine(model)
    root = engine.read_prompt(sample, 128, tokenizer=tokenizer)
    assert walk_from(engine, root, whole) < 1e-4


@pytest.mark.parametrize("family", CAUSAL)
def test_every_causal_family_is_searched(family):
    torch.manual_seed(0)
    model = families[family].build(vocab_size=256, objective="causal").eval()
    found = search(model, ByteTokenizer(), "To be", low_bytes, rollouts=12, max_new_tokens=5,
                   batch_size=5)
    assert low_bytes("To be", found.text) == found.reward and found.root.visits == 12
    assert found.cost.tokens_evaluated <= 12 * 5


def test_cached_is_uncached_without_kernels(monkeypatch):
    "As on a machine without a compiler: torch's attention takes the prompt's columns along."
    monkeypatch.setattr("sprout_lab.kernels.decode.load_c", lambda *_: None)
    assert walk_in_random_order(tiny()) < 1e-4
    model = tiny().double()
    assert walk_in_random_order(model) < 1e-9


@pytest.mark.parametrize("kind", ("llama", "gpt2", "sliding"))
def test_models_of_transformers_are_searched(kind, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                 num_key_value_heads=2, vocab_size=256, max_position_embeddings=64)
    if kind == "llama": model = LlamaForCausalLM(LlamaConfig(**small)).eval()
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=256,
                                           n_positions=64)).eval()
    else: model = MistralForCausalLM(MistralConfig(**small, sliding_window=6)).eval()
    if kind != "sliding": assert walk_in_random_order(model) < 1e-4
    found = search(model, tokenizer, "To be", low_bytes, rollouts=12, max_new_tokens=5)
    ids = torch.tensor([tokenizer.encode("To be") + found.ids])
    with torch.no_grad(): rows = model(ids).logits[0, 4:-1].log_softmax(-1)
    assert found.logprob == pytest.approx(float(rows.gather(-1, ids[0, 5:, None]).sum()), abs=1e-3)


def test_the_prompt_may_be_text_ids_or_embeddings(model, tokenizer):
    ids = tokenizer.encode("To be")
    embeds = model.get_input_embeddings()(torch.tensor([ids])).detach()
    found = [search(model, tokenizer, prompt, low_bytes, rollouts=10, max_new_tokens=6)
             for prompt in ("To be", ids, torch.tensor(ids), embeds, embeds[0])]
    assert len({tuple(one.ids) for one in found}) == 1
    assert found[3].cost.prefix_tokens == 5
    zeroed = search(model, tokenizer, torch.zeros_like(embeds), low_bytes, rollouts=10,
                    max_new_tokens=6)
    assert not torch.allclose(zeroed.root.log_probs, found[0].root.log_probs)
    told = []
    search(model, tokenizer, embeds, lambda prompt, text: told.append(prompt) or 0.0, rollouts=2,
           max_new_tokens=2, prompt_text="a series")
    assert set(told) == {"a series"}


def test_further_inputs_travel_with_the_rows(model, tokenizer):
    class Biased(Counting):
        def forward(self, input_ids, bias=None, **rest):
            assert bias.shape[0] == input_ids.shape[0]
            output = super().forward(input_ids, **rest)
            output.logits = output.logits + bias[:, None]
            return output
    bias = torch.zeros(1, 256)
    bias[0, ord("z")] = 1e3
    found = search(Biased(model), tokenizer, "To be", low_bytes, rollouts=20, max_new_tokens=4,
                   model_inputs={"bias": bias})
    assert found.text == "zzzz"


@pytest.mark.parametrize("method", ("best_of_n", *TREES))
def test_control_c_returns_the_best_so_far(model, tokenizer, method):
    seen = []

    def reward(prompt, text):
        if len(seen) == 70: raise KeyboardInterrupt
        seen.append((low_bytes(prompt, text), text))
        return seen[-1][0]
    found = search(model, tokenizer, "ab", reward, method=method, rollouts=10_000, max_new_tokens=8)
    assert found.interrupted and found.reward == max(seen)[0] == low_bytes("ab", found.text)
    if method in TREES:
        written = sum(len(n.rollouts) for n in all_nodes(found.root) if not n.terminal)
        assert found.root.visits >= written > 0


def test_control_c_before_anything_was_found(model, tokenizer):
    def reward(prompt, text): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): search(model, tokenizer, "ab", reward, max_new_tokens=4)


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_fails_is_named_with_its_text(model, tokenizer, method):
    texts = []

    def broken(prompt, text):
        texts.append(text)
        raise ValueError("no rhyme")
    with pytest.raises(RewardError, match="ValueError: no rhyme") as error:
        search(model, tokenizer, "ab", broken, method=method, rollouts=3, max_new_tokens=4)
    assert " ".join(repr(texts[-1]).split()) in str(error.value)
    with pytest.raises(RewardError, match="nan"):
        search(model, tokenizer, "ab", lambda prompt, text: math.nan, method=method,
               max_new_tokens=4)


def test_a_batch_reward_is_the_same_search(model, tokenizer):
    together = batched(lambda prompt, texts: [low_bytes(prompt, text) for text in texts])
    one, all_at_once = (search(model, tokenizer, "ab", reward, rollouts=30, max_new_tokens=6)
                        for reward in (low_bytes, together))
    assert one.samples == all_at_once.samples and one.reward == all_at_once.reward


def test_rewards_by_name(model, tokenizer, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps({"type": "number"}))
    for written in ("regex:^[a-z]+$", "json", f"json_schema:{tmp_path}/schema.json", "length:10",
                    "likelihood", "1*json + 0.5*likelihood", "python:os.path.commonprefix"):
        if written.startswith("python"):
            assert make_reward(written)(["ab", "ac"]) == "a"
            continue
        reward = make_reward(written, model, tokenizer)
        found = search(model, tokenizer, "ab", reward, rollouts=10, max_new_tokens=6)
        assert reward("ab", found.text) == found.reward, written
    for wrong in ("rhyme", "length:x", "python:os.nothing", "json_schema:/no", "regex:["):
        with pytest.raises(ConfigError): make_reward(wrong, model, tokenizer)


def test_likelihood_of_a_search_is_that_of_its_text(model, tokenizer):
    # what is written must be what the text is encoded to, so bytes of ASCII alone
    model = tiny()
    with torch.no_grad(): model.lm_head.weight[128:] = 0
    found = search(model, tokenizer, "ab", make_reward("likelihood", model, tokenizer), rollouts=30,
                   max_new_tokens=6, expansion_k=8)
    ascii_only = all(token < 128 for token in found.ids)
    assert found.reward == pytest.approx(found.logprob / 6)
    if ascii_only:
        again = make_reward("likelihood", model, tokenizer)("ab", found.text)
        assert again == pytest.approx(found.reward, abs=1e-4)


def enumerated(model, prompt, length: int, vocabulary: int, reward, lam: float) -> dict:
    "π* over all texts of a tiny vocabulary."
    texts = list(itertools.product(range(vocabulary), repeat=length))
    ids = torch.tensor([list(prompt) + list(text) for text in texts])
    with torch.no_grad(): log_probs = model(ids).logits.double().log_softmax(-1)
    start = len(prompt) - 1
    scores = sum(log_probs[range(len(texts)), start + i, ids[:, start + 1 + i]]
                 for i in range(length)).numpy()
    scores = scores + lam * np.array([reward(None, list(text)) for text in texts])
    odds = np.exp(scores - scores.max())
    return dict(zip(texts, odds / odds.sum()))


def total_variation(samples, exact: dict) -> float:
    found = dict(samples)
    return 0.5 * sum(abs(found.get(text, 0.0) - share) for text, share in exact.items())


def test_the_posterior_converges():
    model = tiny(vocab_size=4, seed=1)
    reward = lambda prompt, ids: float(sum(ids) % 5 == 0) + 0.2 * (ids[0] == 2)
    exact = enumerated(model, [1, 2], 4, 4, reward, lam=3.0)
    settings = dict(max_new_tokens=4, lam=3.0, expand="topk", expansion_k=4)
    distances = {}
    for backup in ("soft", "sum"):
        for rollouts in (30, 3000):
            found = search(model, None, [1, 2], reward, rollouts=rollouts, backup=backup,
                           **settings)
            distances[backup, rollouts] = total_variation(found.samples, exact)
    assert distances["soft", 3000] < 0.1 < 0.2 < distances["soft", 30]
    root = search(model, None, [1, 2], reward, rollouts=3000, **settings).root
    assert distances["sum", 3000] > 3 * distances["soft", 3000], distances
    drawn = search(model, None, [1, 2], reward, rollouts=3000, max_new_tokens=4, lam=3.0,
                   expand="sample", widening=0.7)
    assert total_variation(drawn.samples, exact) < 0.2
    assert root.value == pytest.approx(drawn.root.value, abs=0.1)


def test_compare_is_at_equal_tokens(model, tokenizer):
    rows = compare(model, tokenizer, ["ab", "cd"], low_bytes, seeds=(0, 1), rollouts=10,
                   max_new_tokens=6)
    assert {row["method"] for row in rows} == set(METHODS)
    assert all(row["tokens"] <= 50 for row in rows)
    for row in rows:
        if row["method"] in ("best_of_n", *TREES): assert row["tokens"] > 40


def test_wrong_settings_are_answered(model, tokenizer):
    for settings, words in ((dict(method="dtss"), "dts"), (dict(lam=0.0), "lam"),
                            (dict(rollout=3), "rollouts"),
                            (dict(max_new_tokens=900), "at most 255"),
                            (dict(token_budget=2), "token_budget=2"),
                            (dict(stop=["ab"]), "one token"),
                            (dict(expand="all"), "topk")):
        with pytest.raises(ConfigError, match=words):
            search(model, tokenizer, "ab", low_bytes, **settings)
    masked = families["sprout"].build(vocab_size=259)
    with pytest.raises(ConfigError, match="causal"): search(masked, tokenizer, "ab", low_bytes)


@pytest.mark.parametrize("family", ("transformer", "slm"))
def test_what_a_tree_keeps_is_what_the_model_reads(family, tokenizer):
    "Also of nodes that were never leaves: what they know was saved while a text ran through them."
    torch.manual_seed(0)
    model = families[family].build(vocab_size=256, objective="causal").eval()
    found = search(model, tokenizer, "To be", low_bytes, rollouts=40, max_new_tokens=6, lam=30.0,
                   batch_size=3, expansion_k=2)
    known = [node for node in all_nodes(found.root) if node.log_probs is not None]
    assert max(node.depth for node in known) > 2 and len(known) > 10
    for node in known[::3]:
        path = [one.token for one in path_of(node)[1:]]
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode("To be") + path])).logits
        assert torch.allclose(node.log_probs, logits[0, -1].log_softmax(-1), atol=1e-4)


def test_a_mask_keeps_every_text_in_form(model, tokenizer):
    pytest.importorskip("llguidance")
    from sprout_lab.decoding.masks import regex_mask
    mask = regex_mask(tokenizer, "[a-c]{2,4}!")
    for method in ("greedy", "sample", "best_of_n"):
        found = search(model, tokenizer, "ab", low_bytes, method=method, rollouts=20,
                       max_new_tokens=9, mask=mask)
        assert all(re.fullmatch("[a-c]{2,4}!", one.text) for one in found.completions)
        assert found.reward == low_bytes("ab", found.text)
    ids = torch.tensor([tokenizer.encode("ab") + found.ids])
    with torch.no_grad(): rows = model(ids).logits[0, 1:-1].log_softmax(-1)
    own = float(rows.gather(-1, ids[0, 2:, None]).sum())       # the model's, not the mask's
    assert found.logprob == pytest.approx(own, abs=1e-3)
    with pytest.raises(ConfigError, match="takes none"):
        search(model, tokenizer, "ab", low_bytes, method="dts", mask=mask)


def test_the_benchmark_is_found_by_its_name():
    assert "choose from speed, large" in refused("bench search --only sped")
    assert "a clone of SpecDiffTree" in refused("bench search --peer specdifftree=/nowhere")
