"""The benchmark's mechanism at toy sizes: what is compared, how it is written down, what is said
of an absent peer. No times are asserted."""
import json
import sys
from pathlib import Path

import pytest
import torch
from sprout_lab.configs import ConfigError, preset_names, resolve
from sprout_lab.evaluation import recurrent_benchmarks, transformer_benchmarks
from sprout_lab.evaluation.benchmarks import (Row, bench_rows, bench_table, compare, one_thread,
                                              plot_bench, read_bench, side_by_side)
from sprout_lab.evaluation.transformer_benchmarks import (Shape, bench_transformer, loss_at,
                                                          plot_quality, quality_rows, time_to,
                                                          transformer_benchmark)
from sprout_lab.families import families, get_family
from sprout_lab.kernels import build

TINY = Shape("tiny", 2, 2, 32, 64, 16, 2)


@pytest.fixture
def family(): return get_family("transformer")


@pytest.fixture
def toy_parts(monkeypatch):
    "The parts of the benchmark at sizes that take a moment."
    monkeypatch.setattr(transformer_benchmarks, "PARTS",
                        {"training": lambda f, peer, n: transformer_benchmarks.bench_training(f,
            peer, n, shapes=[TINY], steps=1),
                         "decoding": lambda f, peer, n: transformer_benchmarks.bench_decoding(f,
            peer, n, shape=TINY, new=8, far=32, steps=2),
                         "tokenizer": lambda f, peer, n: transformer_benchmarks.bench_tokenizer(f,
            peer, n, characters=5_000, vocab_size=280),
                         "quality": transformer_benchmarks.bench_quality})


@pytest.fixture
def peer(tmp_path):
    "A stand-in with nanoGPT's interface: bigrams."
    (tmp_path / "model.py").write_text('''
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = False

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, ids, targets=None):
        logits = self.table(ids)
        if targets is None: return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas,
                                 weight_decay=weight_decay)
    @torch.no_grad()
    def generate(self, ids, new, top_k=None):
        for _ in range(new): ids = torch.cat([ids, self(ids)[0][:, -1:].argmax(-1)], 1)
        return ids
''')
    return tmp_path


def test_sides_alternate_and_threads_are_restored():
    order, before = [], torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread(): 1 / 0
    with one_thread():
        seconds = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")},
                               repeats=3)
    assert torch.get_num_threads() == before
    assert order == ["a", "b"] + ["a", "b", "b", "a", "a", "b"]
    assert {len(s) for s in seconds.values()} == {3}


def test_ratios_are_paired():
    # a round ten times slower changes no ratio
    seconds = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]}
    row = compare("p", "w", seconds, "ours", "theirs", amount=10, target=">= 2.5")
    assert (row.ratio, row.low, row.high, row.value, row.met) == (2, 2, 2, 10, False)
    cost = compare("p", "w", seconds, "ours", "theirs", cost=True, target="<= 0.5")
    assert cost.ratio == 0.5 and cost.met
    absent = compare("p", "w", seconds, "ours", "nobody", target=">= 1")
    assert absent.value is None and absent.met is None
    assert "nobody: absent" in bench_table([absent])


def test_without_a_clone_the_peer_is_named_absent(family, toy_parts, tmp_path):
    said, file = [], tmp_path / "bench.json"
    rows = bench_transformer(family, repeats=1, output=file, log=said.append)
    text = "\n".join(said)
    assert "nanoGPT: absent" in text
    assert {r.part for r in rows} == {"training", "decoding", "tokenizer"}
    assert all(r.value is None for r in rows if r.against == "nanoGPT")
    assert all(r.value for r in rows if r.against != "nanoGPT")
    content = read_bench(file)
    assert content["benchmark"] == "transformer"
    assert all(part["machine"]["threads"] == 1 for part in content["parts"].values())
    assert bench_rows(content) == [r for part in content["parts"] for r in rows if r.part == part]
    content["parts"]["quality"] = {"rows": []}
    file.write_text(json.dumps(content))
    bench_transformer(family, only=["tokenizer"], repeats=1, output=file, log=said.append)
    # the others stay
    assert list(read_bench(file)["parts"]) == ["training", "decoding", "tokenizer", "quality"]


def test_beside_a_peer(family, toy_parts, peer, capsys):
    rows = bench_transformer(family, peers={"nanogpt": peer}, only=["training", "decoding"],
                             repeats=1, log=lambda words: None)
    assert all(r.ratio > 0 for r in rows)
    assert {r.against for r in rows} >= {"nanoGPT", "HF Llama", "HF generate"}
    assert capsys.readouterr().out == ""
    assert len(plot_bench(rows).png()) > 1000


def test_quality_is_scored_off_the_clock(family, peer):
    curve = transformer_benchmarks.train_ours(family, 1, max_steps=3, warmup_steps=1,
                                              hidden_size=16, num_hidden_layers=1, batch_size=2)
    assert [step for step, *_ in curve] == transformer_benchmarks.scoring_steps(3)
    assert curve[-1][1] > 0 and 2 < curve[-1][2] < 6
    settings = resolve("transformer", family.config_class, presets=["nanogpt_cpu"])
    theirs = transformer_benchmarks.train_nanogpt(transformer_benchmarks.load_nanogpt(peer),
                                                  transformer_benchmarks.load_data(settings.data),
                                                  1, max_steps=3)
    rows = quality_rows([curve, curve], [curve], [theirs], loss=9.0)
    assert rows[0].ratio > 0 and rows[0].rounds == 2 and rows[1].other == theirs[-1][2]
    slow = [[(step, 1000.0 + seconds, loss) for step, seconds, loss in theirs]]
    # ended long before its peer
    assert quality_rows([curve], [curve], slow, loss=9.0)[1].value == curve[-1][2]
    assert quality_rows([curve], [curve], [theirs], loss=0.1)[0].value is None
    assert quality_rows([curve], [curve], [], loss=9.0)[0].target is None
    assert len(plot_quality(rows).png()) > 1000


def test_time_to_a_loss():
    assert time_to([(1, 1.0, 3.0), (2, 2.0, 2.0)], 2.5) == 1.5
    assert loss_at([(1, 1.0, 3.0), (2, 2.0, 2.0)], 1.25) == 2.75
    assert loss_at([(1, 1.0, 3.0)], 0.9) is None
    assert time_to([(1, 1.0, 3.0)], 3.0) == 1.0 and time_to([(1, 1.0, 3.0)], 2.9) is None


@pytest.mark.parametrize("wrong, words",
                         [(dict(only=["trainin"]), "did you mean 'training'"),
                          (dict(repeats=0), "repeats"),
                          (dict(peers={"nanogpt": "/nowhere"}), "model.py"),
                          (dict(output="/nowhere/b.json"), "folder")])
def test_mistakes_are_one_line(family, wrong, words):
    with pytest.raises(ConfigError) as error:
        transformer_benchmark(family, **wrong, log=lambda words: None)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_foreign_file_is_not_overwritten(family, tmp_path):
    file = tmp_path / "notes.json"
    file.write_text('{"my": "notes"}')
    with pytest.raises(ConfigError, match="holds no benchmark"):
        bench_transformer(family, output=file)
    assert file.read_text() == '{"my": "notes"}'


def test_presets_of_the_recipes(family):
    assert {"nanogpt_cpu", "nanogpt_shakespeare"} <= set(preset_names("transformer"))
    cpu = resolve("transformer", family.config_class, presets=["nanogpt_cpu"])
    assert (cpu.data.tokenizer, cpu.data.sequence_length, cpu.model["num_hidden_layers"],
            cpu.model["hidden_size"]) == ("char", 64, 4, 128)
    gpu = resolve("transformer", family.config_class, presets=["nanogpt_shakespeare"])
    assert (gpu.data.sequence_length, gpu.training.batch_size, gpu.training.max_steps,
            gpu.model["dropout"]) == (256, 64, 5000, 0.2)


def test_the_study_is_readable():
    study = Path(__file__).parents[1] / "studies" / "transformer_bench.json"
    assert study.exists(), "the benchmark notes belong to the repository"
    rows = bench_rows(read_bench(study))
    assert rows and all(isinstance(r, Row) for r in rows) and bench_table(rows)


# ---- the recurrent models ---------------------------------------

@pytest.fixture
def tiny_recurrent(monkeypatch):
    "The parts of the recurrent models' benchmark at sizes that take a moment."
    absent = {"slm": recurrent_benchmarks.SLM_ABSENT, "hnet": recurrent_benchmarks.HNET_ABSENT}
    parts = {"scan": lambda f, peer, n: recurrent_benchmarks.bench_scan(f, peer, n,
            shape=(2, 8, 16), narrow=4, lengths=(8, 16)),
             "training": lambda f, peer, n: recurrent_benchmarks.bench_training(f, peer, n,
            size="nano", batches=((1, 8), (2, 8)), absent=absent[f.name]),
             "generation": lambda f, peer, n: recurrent_benchmarks.bench_generation(f, peer, n,
            sizes=["nano"], new=6, few=2),
             "memory": lambda f, peer, n: recurrent_benchmarks.bench_memory(f, peer, n,
            size="nano", lengths=(16,))}
    monkeypatch.setattr(recurrent_benchmarks, "SLM_PARTS", parts)
    monkeypatch.setattr(recurrent_benchmarks, "HNET_PARTS",
                        {name: parts[name] for name in ("training", "generation", "memory")})


@pytest.fixture
def prototype(tmp_path):
    """A stand-in with the prototype's interface: bigrams, and a scan in its order of arguments
    and dimensions."""
    folder = tmp_path / "simplified_slm"
    for name in ("layers", "models", "ops/hgrn"): (folder / name).mkdir(parents=True)
    for name in ("__init__.py", "layers/hgrn_bit.py", "ops/__init__.py"):
        (folder / name).write_text("")
    (folder / "ops/hgrn/__init__.py").write_text('''
import torch
def fused_recurrent_hgrn(x, g, initial_state=None, output_final_state=False):
    h, states = 0, []
    for t in range(x.shape[2]):
        h = g[:, :, t] * h + x[:, :, t]
        states.append(h)
    return torch.stack(states, 2), None
''')
    (folder / "models/__init__.py").write_text('''
from types import SimpleNamespace
import torch
from torch import nn
class SimplifiedSLMConfig(SimpleNamespace): pass
class HNetBitConfig(SimpleNamespace): pass
class SimplifiedSLMForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, input_ids, labels=None, past_key_values=None, use_cache=None):
        logits = self.table(input_ids)
        loss = None
        if labels is not None:
            flat = logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss, past_key_values=())
HNetBitForCausalLM = SimplifiedSLMForCausalLM
''')
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "simplified_slm"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ("slm", "hnet"))
def test_recurrent_models_without_a_peer(name, tiny_recurrent, tmp_path):
    said, file = [], tmp_path / "bench.json"
    benchmark = getattr(recurrent_benchmarks, f"{name}_benchmark")
    rows = benchmark(get_family(name), repeats=1, output=file, log=said.append)
    text = "\n".join(said)
    assert "prototype: absent" in text
    assert ("matmulfreellm" if name == "slm" else "goombalab/hnet") + ": absent" in text
    assert {r.against for r in rows if r.value is None} == {"prototype",
            "ridgerchu/matmulfreellm" if name == "slm" else "goombalab/hnet"}
    assert all(r.value for r in rows if r.value is not None)
    assert {"eager fp32", "state"} <= {r.against for r in rows}
    benchmark(get_family(name), only=["memory"], repeats=1, output=file, log=said.append)
    content = read_bench(file)
    assert list(content["parts"]) == [f"{name} {part}" for part in benchmark.parts]
    assert bench_rows(content)[:2] == rows[:2]


def test_recurrent_models_beside_a_peer(tiny_recurrent, prototype):
    rows = recurrent_benchmarks.bench_slm(get_family("slm"), peers={"simplified_slm": prototype},
                                          only=["scan", "training", "generation"], repeats=1,
                                          log=lambda words: None)
    measured = [r for r in rows if r.against == "prototype"]
    assert len(measured) == 7 and all(r.ratio > 0 for r in measured)
    assert sum(r.target is not None for r in measured) == 5


def test_measures_of_recurrent_models_compute_the_same():
    """The eager form and the one without a compiler are the model, but for activations that round
    the other way; what they change is put back."""
    model = get_family("slm").build(hidden_size=32, num_hidden_layers=1).eval()
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    libraries = build._libraries
    with torch.no_grad():
        want = model(ids).logits
        with recurrent_benchmarks.plain_torch():
            plain, slow = model(ids).logits, recurrent_benchmarks.eager(model)(ids).logits
    assert build._libraries is libraries
    for got in (plain, slow): torch.testing.assert_close(got, want, rtol=0, atol=2e-2)


def test_mistakes_about_the_prototype_are_one_line(prototype):
    for folder in ("/nowhere", prototype.parent):
        with pytest.raises(ConfigError, match="is not a clone of simplified_slm"):
            recurrent_benchmarks.load_simplified_slm(folder)
    (prototype / "models" / "__init__.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(ConfigError, match="cannot be imported"):
        recurrent_benchmarks.load_simplified_slm(prototype)


def test_the_recurrent_study_is_readable():
    rows = bench_rows(read_bench(Path(__file__).parents[1] / "studies" / "slm_bench.json"))
    assert {r.part for r in rows} == {"scan", "training", "generation", "memory"}
    assert bench_table(rows)


# ---- one form for all ----------------------------------------------------------------

@pytest.mark.parametrize("name", list(families))
def test_every_benchmark_declares_its_parts_and_peers(name):
    family = families[name]
    if family.benchmark is None: pytest.skip("has no benchmark")
    assert family.benchmark.parts
    for wrong, says in ((dict(only=["nonsense"]), "choose from"),
                        (dict(peers={"nobody": "/"}), "peer="), (dict(repeats=0), "repeats=0")):
        with pytest.raises(ConfigError, match=says): family.benchmark(family, **wrong)


@pytest.mark.parametrize("file",
                         sorted((Path(__file__).parents[1] / "studies").glob("*_bench.json")),
                         ids=lambda path: path.stem)
def test_measured_rows_have_one_form(file):
    "Ours, the peer's, the ratio and its range, the target, whether it is met; read back as written."
    for part in read_bench(file)["parts"].values():
        assert part["date"] and part["machine"]["torch"]
        for row in part["rows"]:
            assert Row.from_json(row).to_json() == row
            if row["ratio"] is not None: assert row["low"] <= row["ratio"] <= row["high"]
