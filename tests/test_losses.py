"""The same seed gives the same losses as it did: every family's first steps against recorded ones
(studies/reference_losses.json says of which commit)."""
import json
from pathlib import Path

import pytest

from sprout_lab.families import configure, make_trainer
from sprout_lab.runs import read_log
from sprout_lab.trainers.callbacks import Callback

REFERENCE = json.loads((Path(__file__).parent.parent / "studies/reference_losses.json").read_text())
# other processors add up in another order; a changed seed, batch or rate differs by more than ten
# times that
TOLERANCE = 2e-3


class StopAt(Callback):
    def on_step(self, trainer):
        if trainer.step >= self.steps: trainer.stop("enough")


def losses(name: str, steps: int, folder) -> tuple[list, list]:
    "(training loss of each step, held-out losses before and after) of a nano run."
    flags = {"max_steps": 50, "eval_interval": 50, "eval_batches": 4, "log_interval": 1,
             "sample_tokens": 0,
             "device": "cpu", "tensorboard": False, "output_dir": str(folder)}
    enough = StopAt()   # stopped, not shortened: the schedule stays that of fifty steps
    enough.steps = steps
    trainer = make_trainer(configure(name, flags), log=lambda line: None, extra_callbacks=[enough])
    trainer.train()
    return read_log(trainer.run.training_log)["loss"], read_log(trainer.run.eval_log)["loss"]


def compare(name: str, steps: int, folder) -> None:
    trained, held_out = losses(name, steps, folder)
    recorded = REFERENCE["families"][name]
    assert trained == pytest.approx(recorded["train_loss"][:steps], abs=TOLERANCE)
    assert held_out[0] == pytest.approx(recorded["held_out_loss"][0], abs=TOLERANCE)
    if steps == 50:
        assert held_out[-1] == pytest.approx(recorded["held_out_loss"][-1], abs=TOLERANCE)


@pytest.mark.parametrize("name", list(REFERENCE["families"]))
def test_first_losses_are_as_recorded(name, tmp_path): compare(name, 5, tmp_path)


@pytest.mark.slow   # fifty steps of every family: two minutes
@pytest.mark.parametrize("name", list(REFERENCE["families"]))
def test_all_losses_are_as_recorded(name, tmp_path): compare(name, 50, tmp_path)
