"""The decoding engine and sampling: equal to the plain model in every order of operations, and to
`generate`."""

import random

import pytest
import torch
from laws import perturbed, random_ids

from sprout_lab.configs import ConfigError
from sprout_lab.data.tokenizers import ByteTokenizer, CharTokenizer
from sprout_lab.decoding.engine import Engine
from sprout_lab.decoding.sampling import (
    SamplingConfig, TextStream, generate_text, generate_tokens, sample_tokens, stream_text)
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM


def build(**kwargs):
    torch.manual_seed(0)
    return TransformerForCausalLM(TransformerConfig(**{**dict(hidden_size=32, num_hidden_layers=2,
                                                              max_position_embeddings=96),
                                                       **kwargs}))


@pytest.fixture(scope="module")
def model():
    return perturbed(build(num_key_value_heads=2))


def logits_alone(model, text):
    with torch.no_grad():
        return model(torch.tensor([text]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_operations(model, seed):
    """A random walk through step, fork, select and drop; every row stays what it would be alone,
    and forks leave the old state alone."""
    rng = random.Random(seed)
    engine = Engine(model)
    texts = [[rng.randrange(256) for _ in range(rng.randrange(1, 9))]
             for _ in range(rng.randrange(1, 5))]
    state = engine.prefill(texts, capacity=rng.choice([None, 4, 40]))
    left_behind = []
    for _ in range(18):
        act = rng.choice(["step", "step", "step", "several", "fork", "select", "drop"])
        if act == "step":
            tokens = [rng.randrange(256) for _ in texts]
            engine.step(state, tokens)
            texts = [t + [n] for t, n in zip(texts, tokens)]
        elif act == "several":
            tokens = [[rng.randrange(256) for _ in range(3)] for _ in texts]
            engine.step(state, tokens)
            texts = [t + n for t, n in zip(texts, tokens)]
        elif act == "fork" and len(texts) < 5:
            left_behind.append((state, texts))
            n = rng.choice([1, 2])
            state, texts = engine.fork(state, n), [t for t in texts for _ in range(n)]
        elif act == "select":
            rows = [rng.randrange(len(texts)) for _ in range(rng.randrange(1, 5))]
            engine.select(state, rows)
            texts = [texts[r] for r in rows]
        elif act == "drop" and len(texts) > 1:
            row = rng.randrange(len(texts))
            engine.drop(state, [row])
            texts = texts[:row] + texts[row + 1:]
        assert len(state) == len(texts) and state.lengths.tolist() == [len(t) for t in texts]
        for row, text in enumerate(texts):
            assert (state.logits[row] - logits_alone(model, text)).abs().max() < 1e-6
    for state, texts in left_behind:
        tokens = [rng.randrange(256) for _ in texts]
        engine.step(state, tokens)
        for row, text in enumerate(texts):
            assert (state.logits[row] - logits_alone(model,
                                                     text + [tokens[row]])).abs().max() < 1e-6


@pytest.mark.parametrize("switches", [{}, {"position": "none"}, {"position": "rope_half"},
                                      {"norm": "post", "qk_norm": True}])
def test_greedy_equals_generate(switches):
    model = perturbed(build(**switches))
    prompts = [random_ids(model, 1, n, seed=n)[0].tolist() for n in (3, 7, 5)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    want = model.generate(ids, attention_mask=mask, max_new_tokens=25,
                          do_sample=False)[:, width:].tolist()
    got = [[] for _ in prompts]
    for now in generate_tokens(Engine(model), prompts,
                               SamplingConfig(max_tokens=25, temperature=0)):
        for row, token in zip(now.rows, now.tokens):
            got[row].append(token)
    assert got == want


def test_rows_end_on_their_own(model):
    engine = Engine(model)
    config = SamplingConfig(max_tokens=20, temperature=0)
    alone = [[t for now in generate_tokens(engine, [p], config) for t in now.tokens]
             for p in ([1, 2], [3, 4, 5], [6])]
    ends = {alone[0][4], alone[2][9]}
    rows = {0: [], 1: [], 2: []}
    for now in generate_tokens(engine, [[1, 2], [3, 4, 5], [6]], config, ends):
        for row, token in zip(now.rows, now.tokens):
            rows[row].append(token)
    for row, text in enumerate(alone):
        cut = next((i + 1 for i, t in enumerate(text) if t in ends), 20)
        assert rows[row] == text[:cut]


def test_training_mode_is_left_as_it_was():
    model = build(dropout=0.5).train()
    first = Engine(model).prefill([[1, 2, 3]]).logits
    assert model.training and torch.equal(first, Engine(model).prefill([[1, 2, 3]]).logits)


def test_the_state_is_ordinary_tensors(model):
    engine = Engine(model)
    state = engine.prefill([[1, 2], [3]])
    state.logits.div_(2)                                    # inference tensors would refuse this
    assert not state.logits.is_inference() and not state.logits.requires_grad
    engine.step(engine.fork(state, 2), [1, 2, 3, 4])


@pytest.mark.parametrize("wrong", [[], [[]], [[1], []], [[256]], [[-1, 5]], [[1] * 97]])
def test_wrong_prompts_in_one_line(model, wrong):
    with pytest.raises(ConfigError) as caught:
        Engine(model).prefill(wrong)
    assert "\n" not in str(caught.value)


def test_past_the_maximum(model):
    engine = Engine(model)
    state = engine.prefill([[1] * 95, [2]])
    engine.step(state, [1, 1])
    with pytest.raises(ConfigError, match="max_position_embeddings=96"):
        engine.step(state, [1, 1])
    engine.drop(state, [0])
    # the short row has room, though its columns are beyond the limit
    engine.step(state, [5])
    assert (state.logits[0] - logits_alone(model, [2, 1, 5])).abs().max() < 1e-6
    assert len(list(generate_tokens(engine, [[1] * 90], SamplingConfig(max_tokens=7)))) == 7
    with pytest.raises(ConfigError, match="ask for at most 7"):
        list(generate_tokens(engine, [[1] * 90], SamplingConfig(max_tokens=8)))


def test_diverged_weights_are_told():
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ConfigError, match="diverged"):
        generate_text(model, ByteTokenizer(), "a", max_tokens=5)


@pytest.mark.parametrize("how",
                         [{}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.3},
                          {"top_k": 7, "top_p": 0.8}, {"temperature": 0.01}, {"temperature": 50.0},
                          {"top_p": 1e-9}])
def test_samples_stay_within_what_is_allowed(how):
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)) * 3
    for u in (0.0, 0.5, 1 - 2**-24):
        tokens = sample_tokens(logits, torch.full((64,), u), **how)
        scores = (logits / how.get("temperature", 1.0)).softmax(-1)
        if "top_k" in how:
            kept = scores.topk(how["top_k"])
            scores = torch.zeros_like(scores).scatter(1, kept.indices, kept.values)
            scores /= scores.sum(-1, keepdim=True)
        ordered, ids = scores.sort(descending=True)
        inside = ordered.cumsum(-1) - ordered < how.get("top_p", 2.0)
        inside[:, 0] = True
        allowed = torch.zeros_like(inside).scatter(1, ids, inside) & (scores > 0)
        assert allowed[torch.arange(64), tokens].all()


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 2] = 0.0
    for u in (0.0, 0.999):
        assert sample_tokens(logits, torch.tensor([u])).item() == 2
        assert sample_tokens(logits, torch.tensor([u]), top_k=3, top_p=0.5).item() == 2


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語テキスト", "👩‍👩‍👧‍👦 family",
                                  "a\u0301\u0327 marks", "\r\n\t tabs", "mixed: é中😀" * 20, ""])
def test_streams_give_whole_characters(text):
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(t) for t in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("seed", range(5))
def test_streams_equal_the_whole_on_any_bytes(seed):
    rng = random.Random(seed)
    raw = [rng.choice([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 65, 66, 0xC3, 0xA9, 0x80])
           for _ in range(300)]
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, raw)) + stream.flush() == bytes(raw).decode(errors="replace")


def test_text_by_characters():
    tokenizer = CharTokenizer.from_text("abc \n")
    model = build(vocab_size=tokenizer.vocab_size)
    text = generate_text(model, tokenizer, "ab", max_tokens=20, seed=0)[0]
    assert len(text) == 20 and set(text) <= set("abc \n")
    pieces = stream_text(model, tokenizer, "ab", max_tokens=20, seed=0)
    assert "".join(piece.text for piece in pieces) == text
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate_text(model, tokenizer, "")


@pytest.mark.parametrize("wrong",
                         [{"temperature": -1}, {"top_p": 0}, {"top_k": -3},
                          {"repetition_penalty": 0}, {"max_tokens": 0}, {"stop": [""]},
                          {"stop": [3]}, {"num_samples": 0}, {"temprature": 1}, {"seed": -1}])
def test_wrong_settings_in_one_line(wrong):
    with pytest.raises(ConfigError) as caught:
        generate_text(build(), ByteTokenizer(), "a", **wrong)
    assert "\n" not in str(caught.value)


def test_stop_strings_wherever_they_fall(model):
    tokenizer = ByteTokenizer()
    whole = generate_text(model, tokenizer, "x", max_tokens=40, seed=5, top_k=0, top_p=1.0)[0]
    for start in range(0, len(whole) - 2, 5):
        stop = whole[start:start + 2]
        want = whole[:whole.find(stop)]
        assert generate_text(model, tokenizer, "x", max_tokens=40, seed=5, top_k=0, top_p=1.0,
                             stop=[stop]) == [want]
        pieces = list(stream_text(model, tokenizer, "x", max_tokens=40, seed=5, top_k=0, top_p=1.0,
                                  stop=[stop]))
        assert "".join(p.text for p in pieces) == want
        assert [p.finish for p in pieces if p.finish] == ["stop"]


def test_repetition_penalty_as_hugging_face_has_it(model):
    single = model.float() if model.dtype != torch.float64 else model
    prompt = [5, 6, 5, 7]
    want = single.generate(torch.tensor([prompt]), max_new_tokens=15, do_sample=False,
                           repetition_penalty=1.7)[0, 4:].tolist()
    got = [now.tokens[0]
           for now in generate_tokens(Engine(single), [prompt],
                                      SamplingConfig(max_tokens=15, temperature=0,
                                                     repetition_penalty=1.7))]
    assert got == want


FAMILIES = {
    "transformer": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "slm": dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, use_short_conv=True),
    "hnet": dict(d_model=[32, 48], num_blocks=[[1, 0, 1], [2]], inner_pattern="xa",
                 num_attention_heads=2),
    "sprout": dict(hidden_size=32, num_attention_heads=2)}


def causal_families():
    "Every causal family of the register; one that has no small shape here is built as it is."
    from sprout_lab.families import families
    return [name for name, family in families.items() if "causal" in family.models]


@pytest.fixture(scope="module", params=causal_families())
def any_model(request):
    from sprout_lab.families import get_family
    torch.manual_seed(0)
    family, shape = get_family(request.param), FAMILIES.get(request.param, {})
    known = family.config_class.settings.model_fields
    if "routing" in known: shape = {**shape, "routing": "token"}
    if "growth" in known: shape = {**shape, "growth": "none"}
    return perturbed(family.build("nano", objective="causal", **shape))


@pytest.mark.parametrize("seed", range(3))
def test_a_running_batch_takes_in_new_rows(any_model, seed):
    "Rows join, end, are copied and go on; each is what it would be alone, in every family."
    rng, engine = random.Random(seed), Engine(any_model)
    new = lambda least, most: [rng.randrange(256) for _ in range(rng.randrange(least, most))]
    texts = [new(1, 7) for _ in range(2)]
    state = engine.prefill(texts, capacity=rng.choice([None, 30]))
    acts = ["join", "step", "join", "drop", "step", "fork", "join", "step", "drop", "step", "join"]
    for act in acts:
        if act == "join":
            prompts = [new(1, 12) for _ in range(rng.randrange(1, 3))]
            joining = engine.prefill(prompts, piece=rng.choice([None, 1, 3]))
            engine.join(state, joining)
            texts += prompts
        elif act == "step":
            tokens = [rng.randrange(256) for _ in texts]
            engine.step(state, tokens)
            texts = [t + [n] for t, n in zip(texts, tokens)]
        elif act == "fork": state, texts = engine.fork(state), list(texts)
        elif act == "drop" and len(texts) > 1:
            row = max(range(len(texts)), key=lambda r: len(texts[r]))   # the longest: columns go
            engine.drop(state, [row])
            texts = texts[:row] + texts[row + 1:]
        assert state.lengths.tolist() == [len(t) for t in texts]
        for row, text in enumerate(texts):
            difference = (state.logits[row] - logits_alone(any_model, text)).abs().max()
            assert difference < 1e-6, f"{act}: row {row} of {len(texts)}"


@pytest.mark.parametrize("piece", [1, 2, 5, 100])
def test_a_prompt_read_in_pieces(any_model, piece):
    engine, rng = Engine(any_model), random.Random(piece)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (9, 1, 14)]
    states = list(engine.prefill_pieces(prompts, piece=piece))
    assert len({id(s) for s in states}) == 1 and len(states) == -(-14 // piece)
    engine.step(states[-1], [3, 4, 5])
    for row, (prompt, token) in enumerate(zip(prompts, (3, 4, 5))):
        want = logits_alone(any_model, prompt + [token])
        assert (states[-1].logits[row] - want).abs().max() < 1e-6


def test_a_batch_stays_as_wide_as_its_longest_text(model):
    engine = Engine(model)
    state = engine.prefill([[1] * 60])
    for _ in range(40):
        engine.join(state, engine.prefill([[2, 3]]))
        engine.step(state, [5] * len(state))
        if len(state) > 2: engine.drop(state, [0])
    assert state.columns < 12 and int(state.lengths.max()) < 8
