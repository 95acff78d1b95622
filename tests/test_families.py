"""What every family of the register must have and keep, one test for each promise; a family without
it fails here."""
from pathlib import Path

import numpy as np
import pytest
import torch
from laws import check_laws

from sprout_lab.configs import ConfigError
from sprout_lab.families import SIZES, configure, families, get_family, load_model, make_trainer
from sprout_lab.objectives import get_objective, objective_of
from sprout_lab.visualizers.style import Figure

root = Path(__file__).parent.parent
EACH = pytest.mark.parametrize("name", list(families))
TEXT = ("To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer the "
        "slings and arrows. " * 8)


def small(name: str, objective: str | None = None, **fields):
    "A model of the smallest shape that a family's nano preset has been cut down to."
    family = get_family(name)
    settings = family.config_class.settings.model_fields
    cut = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 64,
           "d_model": [16, 24], "num_blocks": [[1, 0, 1], [1]], "max_position_embeddings": 128,
           **fields}
    kind = get_objective(objective or family.objective)
    if kind.counted != "tokens": cut["max_position_embeddings"] = 512   # questions are not cut
    # a causal tree may not choose a path by what follows
    if objective == "causal": cut["routing"] = "token"
    torch.manual_seed(0)
    return family.build(objective=objective,
                        **{key: value for key, value in cut.items() if key in settings}).eval()


@EACH
def test_entry_is_complete(name):
    family = get_family(name)
    assert (set(SIZES) <= set(family.presets) and family.summary.endswith(".")
            and family.pictures and family.benchmark)
    assert (set(family.top_settings) <= set(family.config_class.settings.model_fields)
            and family.top_settings)
    for objective in family.objectives: assert get_objective(objective).name == objective
    for study in family.studies: assert (root / study).exists(), study
    assert (root / f"nbs/guides/{name}.ipynb").exists() and (root / f"colab/{name}.ipynb").exists()


@EACH
def test_laws(name):
    if "causal" in get_family(name).objectives: check_laws(small(name, "causal"))


@EACH
def test_knows_its_objective_and_saves_whole(name, tmp_path):
    for objective in get_family(name).objectives:
        model = small(name, objective)
        assert objective_of(model).name == objective
        model.save_pretrained(tmp_path / objective)
        again, _ = load_model(tmp_path / objective)
        assert type(again) is type(model)
        for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
            assert torch.equal(a, b), key


def one_batch(name: str, model, kind) -> dict:
    "A batch of text, or of what an objective trains on that reads no plain text."
    from sprout_lab.data.tokenizers import ByteTokenizer
    tokens, tokenizer = np.frombuffer(b"a small cat sat on the mat. " * 40, np.uint8), None
    if kind.counted != "tokens":
        data = kind.load_data(configure(name))
        tokens, tokenizer = data.train, data.tokenizer
    return kind.batches(model.config, tokens, tokenizer or ByteTokenizer(masked=True), 32,
                        8).batch(0)


@EACH
def test_overfits_one_batch(name):
    for objective in get_family(name).objectives:
        model = small(name, objective).train()
        batch = one_batch(name, model, get_objective(objective))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
        losses = []
        for _ in range(60):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], (objective, losses[0], losses[-1])


@pytest.mark.parametrize("size", SIZES)
def test_sizes_match_across_families(size):
    counts = {name: fully_grown(family, configure(name, size=size)) for name,
              family in families.items()}
    assert max(counts.values()) <= 1.10 * min(counts.values()), (size, counts)


def fully_grown(family, run) -> int:
    "Parameters of a run's model; a growing one is counted at its largest."
    fields = {**run.model, "vocab_size": run.data.vocab_size or 256}
    if "max_nodes" in fields: fields["tree"] = [-1, *[0] * (fields["max_nodes"] - 1)]
    with torch.device("meta"):
        model = family.model_class(run.objective)(family.config_class(**fields))
    return sum(p.numel() for p in model.parameters())


@EACH
def test_pictures_draw(name):
    from sprout_lab.data.tokenizers import ByteTokenizer
    family, masked = get_family(name), get_family(name).objective == "masked"
    model = small(name, vocab_size=len(ByteTokenizer(masked=masked)), **({"tree": [-1, 0, 0]}
                           if "tree" in family.config_class.settings.model_fields else {}))
    for picture in family.pictures:
        figure = family.draw(picture, model, ByteTokenizer(masked=masked), TEXT)
        assert isinstance(figure, Figure) and figure.axes, picture
    with pytest.raises(ConfigError, match="did you mean"): family.draw(f"{picture}s", model)


@EACH
def test_killed_and_resumed_is_the_same_run(name, tmp_path):
    flags = {"max_steps": 6, "batch_size": 2, "sequence_length": 32, "eval_interval": 3,
             "eval_batches": 1, "final_eval_batches": 1, "save_interval": 3,
             "log_interval": 1, "sample_tokens": 0, "tensorboard": False, "device": "cpu"}
    quiet = lambda line: None
    whole = make_trainer(configure(name, {**flags, "output_dir": str(tmp_path / "whole")}),
                         log=quiet)
    whole.train()
    first = make_trainer(configure(name, {**flags, "output_dir": str(tmp_path / "cut")}), log=quiet)
    first.emit("on_prepare"); first.emit("on_start")
    for _ in range(4):   # killed one step after its checkpoint at step 3
        first.train_step()
        first.step += 1
        first.emit("on_step")
    again = make_trainer(configure(name, {"output_dir": str(tmp_path / "cut"),
                                          "resume_from": "auto"}), log=quiet)
    assert again.step == 3
    again.train()
    for (key, a), (_, b) in zip(whole.model.state_dict().items(), again.model.state_dict().items()):
        assert torch.equal(a, b), key


@EACH
def test_panel_builds(name):
    from sprout_lab.panels import panel
    from sprout_lab.configs import settings_fields
    shown = {spec.name for spec in settings_fields(get_family(name).config_class)}
    assert shown & set(panel(name).controls), "none of the family's settings has a control"
