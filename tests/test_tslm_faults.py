"""Seven faults of a public prototype, each restated in a few lines: the check that ours passes is
one that the fault does not."""
from dataclasses import replace

import pytest
import torch
import yaml
from laws import perturbed

from sprout_lab.configs import ConfigError
from sprout_lab.curriculum import start_from
from sprout_lab.data.series import SampleEncoder, SeriesSample, collate
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.evaluation.series import judge
from sprout_lab.families import configure
from sprout_lab.models.series_encoder import SeriesEncoder
from sprout_lab.models.tslm import OpenTSLM, OpenTSLMFlamingo, TSLMConfig
from sprout_lab.trainers.checkpoints import read_tensors

TOKENIZER = ByteTokenizer()
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, encoder_hidden_size=16,
            encoder_num_layers=1, encoder_num_heads=2, encoder_intermediate_size=32, num_latents=4,
            resampler_num_layers=1, resampler_num_heads=2, cross_attention_heads=2,
            cross_attention_head_dim=8, max_patches=64, max_position_embeddings=512,
            bos_token_id=254, eos_token_id=255, pad_token_id=255)
SHORT = SeriesSample("", ["A"], [[1.0, 2.0, 4.0, 8.0, 16.0]], " Up? ", "Answer: yes", "yes",
                     ("yes", "no"))
LONG = SeriesSample("Look. ", ["A", "B"], [[3.0, 2.0, 7.0], [1.0, 5.0, 0.0, 1.0, 1.0, 2.0]],
                    " Up? ", "First it falls. Answer: no", "no", ("yes", "no"))


def moved(model): return perturbed(model, scale=0.5)


# padding attended

class AttendsToPadding(SeriesEncoder):
    "Pads every series to the longest, and takes all of it for real."

    def forward(self, series, lengths):
        return super().forward(series, torch.full_like(lengths, series.shape[1]))


def check_padding_is_not_attended(encoder_class):
    torch.manual_seed(0)
    encoder = encoder_class(16, 2, 2, 32, max_patches=8)
    torch.nn.init.normal_(encoder.positions)
    encoder = moved(encoder)
    series, lengths = torch.randn(2, 20).double(), torch.tensor([8, 20])
    series[0, 8:] = 0.0
    alone, _ = encoder(series[:1, :8], lengths[:1])
    together, visible = encoder(series, lengths)
    assert (together[0][visible[0]][:2] - alone[0]).abs().max() < 1e-9
    assert visible[0].sum() == 2


# the answers' padding in the loss

def learns_padding(rows) -> dict:
    "Answers padded to the longest, and the padding asked for like any token."
    batch = collate(rows, TOKENIZER.pad_token_id)
    beyond = batch["attention_mask"] == 0
    filled = batch["shift_labels"].masked_fill(beyond, TOKENIZER.pad_token_id)
    return {**batch, "shift_labels": filled}


def check_only_answers_are_learned(collated):
    rows = [SampleEncoder(TOKENIZER).encode(sample) for sample in (SHORT, LONG)]
    targets = collated(rows)["shift_labels"]
    for sample, row in zip((SHORT, LONG), targets.tolist()):
        learned = [token for token in row if token != -100]
        assert learned == [*sample.answer.encode(), TOKENIZER.eos_token_id]


# many BOS

class BeginsEveryPiece(SampleEncoder):
    "Every piece of the text goes through the tokenizer with its special tokens."

    def words(self, text): return [TOKENIZER.bos_token_id, *super().words(text)]


def check_one_bos(encoder_class):
    for sample in (SHORT, LONG):
        ids = encoder_class(TOKENIZER).encode(sample).ids
        assert ids[0] == TOKENIZER.bos_token_id and ids.count(TOKENIZER.bos_token_id) == 1


# the second series ignored in Flamingo

class LooksAtTheFirst(OpenTSLMFlamingo):
    "Of several series the words see one."

    def look(self, series, series_lengths):
        return super().look(series[:, :1], series_lengths[:, :1])


def check_all_series_are_seen(model_class):
    torch.manual_seed(0)
    model = moved(model_class(TSLMConfig(form="flamingo", **TINY)))
    batch = collate([SampleEncoder(TOKENIZER, 4, False).encode(LONG)])
    batch["series"] = batch["series"].double()
    del batch["shift_labels"]

    def last(series):
        with torch.no_grad():
            return model(**{**batch, "series": series}, use_cache=False).logits[0, -1]
    for k in range(2):
        turned = batch["series"].clone()
        turned[0, k] *= -1
        assert (last(turned) - last(batch["series"])).abs().max() > 1e-6


# LoRA weights dropped between stages

def starts_without_adapters(model, folder):
    "Takes over encoder and projector; the adapters of the stage before are not asked for."
    weights = read_tensors(folder / "model.safetensors")
    model.load_state_dict({name: w for name, w in weights.items() if "lora_" not in name},
                          strict=False)


def check_adapters_survive(start, folder):
    pytest.importorskip("peft")
    first, second = (OpenTSLM(TSLMConfig(lora_rank=2, **TINY)) for _ in range(2))
    adapters = {name: p for name, p in first.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for p in adapters.values(): p.normal_()
    first.save_pretrained(folder)
    start(second, folder)
    assert adapters
    for name, p in second.named_parameters():
        if "lora_" in name: assert torch.equal(p, adapters[name]), name


# YAML keys ignored

GUIDE = {"experiment": {"name": "one", "tags": ["a"], "notes": "first"},
         "dataset": {"name": "TSQA", "num_samples_train": 6300},
         "model": {"type": "OpenTSLMSP", "llm_id": "meta-llama/Llama-3.2-1B",
                   "gradient_checkpointing": False},
         "training": {"num_epochs": 30, "batch_size": 8, "lr_encoder": 2e-4, "lr_projector": 1e-4,
                      "grad_clip_norm": 1.0},
         "device": {"type": "cpu"}}
OTHER = {"name": {"experiment": "two", "dataset": "M4"}, "tags": ["b"], "notes": "second",
         "num_samples_train": 100, "type": {"model": "OpenTSLMFlamingo", "device": "cuda"},
         "llm_id": "runs/mine", "gradient_checkpointing": True, "num_epochs": 3, "batch_size": 4,
         "lr_encoder": 1e-3, "lr_projector": 5e-5, "grad_clip_norm": 0.5}


def reads_all(path) -> str:
    "What ours makes of a file: every resolved setting."
    run = configure(None, {}, config=str(path), log=lambda line: None)
    parts = (run.output, run.data, run.training)
    return repr([vars(part) if hasattr(part, "__dict__") else part
                 for part in parts]) + repr(run.model)


def reads_some(path) -> str:
    "Takes the keys that it knows; the rest of the file has defaults of the program's own."
    content = yaml.safe_load(path.read_text())
    kept = {name: content["training"].get(name) for name in ("num_epochs", "batch_size")}
    return repr({**kept, "model": content["model"]["llm_id"], "lr_encoder": 2e-4, "clip": 1.0})


def check_every_key_counts(reader, folder):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(GUIDE))
    before = reader(path)
    for section, keys in GUIDE.items():
        for key in keys:
            new = OTHER[key][section] if isinstance(OTHER[key], dict) else OTHER[key]
            path.write_text(yaml.safe_dump({**GUIDE, section: {**keys, key: new}}))
            assert reader(path) != before, f"{section}.{key} is ignored"


# an empty answer counted right

def contains(samples, texts) -> dict:
    "Right is what is contained in the expected answer, or contains it."
    right = [text.lower() in s.answer.lower() or s.label in text.lower()
             for s, text in zip(samples, texts)]
    return {"accuracy": sum(right) / len(right)}


def check_empty_answers_are_wrong(score):
    samples = [SHORT, LONG]
    assert score(samples, ["Answer: yes", "So: Answer: no"])["accuracy"] == 1
    for empty in ("", "Answer: ", "Answer", "."):
        assert score(samples, [empty, empty])["accuracy"] == 0, repr(empty)


FAULTS = {"padding attended": (check_padding_is_not_attended, SeriesEncoder, AttendsToPadding),
          "padding learned": (check_only_answers_are_learned,
                              lambda rows: collate(rows, TOKENIZER.pad_token_id), learns_padding),
          "many BOS": (check_one_bos, SampleEncoder, BeginsEveryPiece),
          "one series seen": (check_all_series_are_seen, OpenTSLMFlamingo, LooksAtTheFirst),
          "adapters dropped": (check_adapters_survive, start_from, starts_without_adapters),
          "keys ignored": (check_every_key_counts, reads_all, reads_some),
          "empty is right": (check_empty_answers_are_wrong, judge, contains)}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_caught_and_ours_is_without_it(fault, tmp_path):
    check, ours, theirs = FAULTS[fault]
    place = (tmp_path,) if fault in ("adapters dropped", "keys ignored") else ()
    check(ours, *place)
    with pytest.raises(AssertionError): check(theirs, *place)


def test_the_padding_changes_the_loss_where_it_is_learned():
    "The number that training follows: with padding in it, it is another one."
    torch.manual_seed(0)
    model = moved(OpenTSLM(TSLMConfig(**TINY)))
    rows = [SampleEncoder(TOKENIZER).encode(sample) for sample in (SHORT, LONG)]

    def loss(batch):
        with torch.no_grad():
            return float(model(**{**batch, "series": batch["series"].double()}).loss)
    counts = [sum(t != -100 for t in row.targets) for row in rows]
    alone = [loss(collate([row])) * count for row, count in zip(rows, counts)]
    want = sum(alone) / sum(counts)
    assert abs(loss(collate(rows, 255)) - want) < 1e-9
    assert abs(loss(learns_padding(rows)) - want) > 1e-3


def test_a_key_that_does_not_exist_is_named(tmp_path):
    wrong = {**GUIDE, "training": {**GUIDE["training"], "lr_projektor": 1e-4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError, match="did you mean 'lr_projector'"):
        configure(None, {}, config=str(tmp_path / "run.yaml"))


def test_an_unknown_label_is_a_miss_and_no_new_class():
    samples = [SHORT, replace(SHORT, label="no")]
    scores = judge(samples, ["Answer: yes", "Answer: sideways"])
    assert (scores["accuracy"], scores["macro_f1"]) == (0.5, 0.5)
