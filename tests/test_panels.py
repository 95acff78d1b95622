"""Panels without a browser: controls, threads, stop and resume, errors, what a live run leaves in a
notebook."""
import ast
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ipywidgets as widgets
import nbformat
import pytest
from nbclient import NotebookClient

from sprout_lab.configs import ConfigError, sections, settings_fields
from sprout_lab.families import configure, families, make_trainer
from sprout_lab.panels import compare, panel, playground
from sprout_lab.panels.compare import config_differences
from sprout_lab.panels.live import Live
from sprout_lab.panels.controls import Control
from sprout_lab.runs import read_log
from sprout_lab.trainers.trainer import Trainer

root = Path(__file__).parent.parent
SMALL = dict(optimizer="adamw", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
             sequence_length=32, batch_size=8, eval_interval=20, eval_batches=2, save_interval=30,
             log_interval=1,
             tensorboard=False, sample_tokens=0)


@pytest.fixture
def small(tmp_path): return {**SMALL, "max_steps": 60, "output_dir": str(tmp_path / "run")}


@pytest.mark.parametrize("name", list(families))
def test_every_control_keeps_its_settings_bounds(name):
    for cls in (families[name].config_class, *sections.values()):
        for spec in settings_fields(cls):
            control = Control(spec)
            assert control.value == spec.default
            if not isinstance(control,
                              (widgets.IntSlider, widgets.FloatSlider, widgets.FloatLogSlider,
                               widgets.SelectionSlider, widgets.BoundedIntText)):
                continue
            if isinstance(control, widgets.SelectionSlider):
                low, high = control.options[0][1], [v for _,
                                                    v in control.options if v != "none"][-1]
            elif isinstance(control, widgets.FloatLogSlider):
                low, high = 10**control.min, 10**control.max
            else: low, high = control.min, control.max
            assert (spec.ge is None or low >= spec.ge) and (spec.gt is None or low > spec.gt), spec
            assert (spec.le is None or high <= spec.le * 1.0001) and (spec.lt is None
                                                                      or high < spec.lt), spec


@pytest.mark.parametrize("name", list(families))
def test_every_preset_is_shown_and_its_command_names_nothing_else(name):
    p = panel(name)
    for preset in families[name].presets:
        p.preset.value = preset
        run, plain = p.config(), configure(name, {}, preset=preset, log=lambda words: None)
        assert run.to_dict() == plain.to_dict()
        assert f"--preset {preset}" in p.command


def test_the_command_line_says_the_same(small):
    p = panel("transformer", lr=3e-3, tags=["one", "two words"], **small)
    assert "--learning_rate 0.003" in p.command and "--optimizer adamw" in p.command
    from click.testing import CliRunner
    import shlex
    from sprout_lab.cli import cli
    words = shlex.split(p.command)
    shown = CliRunner().invoke(cli, [*words[1:], "--dry_run"])
    assert shown.exit_code == 0, shown.output
    told = {line.split()[0]: line for line in shown.output.splitlines() if line.startswith("  ")}
    for name, value in {**SMALL, "max_steps": 60, "learning_rate": 0.003,
                        "tags": ["one", "two words"]}.items():
        assert json.dumps(value) in told[name], name


@pytest.mark.parametrize("change, words", [
    ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
    ({"min_learning_rate": 1.0}, "min_learning_rate=1 is above learning_rate"),
    ({"dataset_name": "shakespear"}, "shakespear"),
    ({"output_dir": os.devnull}, os.devnull),
])
def test_a_mistake_is_one_line(small, change, words):
    p = panel("transformer", **{**small, **change})
    p.run()
    p.wait(30)
    assert (p.state == "failed" and words in p.message and "\n" not in p.message
            and "Traceback" not in p.message)
    assert words.split("=")[0].split("/")[-1] in p.shown.status.value


def test_what_is_typed_wrong_is_refused_in_the_panel(small):
    p = panel("transformer", **small)
    p.controls["max_grad_norm"].value = "much"
    assert "max_grad_norm=&#x27;much&#x27;: a number above 0, or none is needed" in p.shown.command_line.value
    p.controls["max_grad_norm"].value = "1.0"
    # fine beside this preset's learning rate, if not beside the default one
    p.set(min_learning_rate=0.008, num_epochs=2)
    assert p.config().training.max_steps == 60 and p.config().training.num_epochs == 2
    p.set(max_steps=None)
    assert p.config().training.max_steps is None
    p.controls["max_grad_norm"].value = "none"
    assert "--max_grad_norm none" in p.shown.command_line.value
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"): p.set(hiden_size=3)
    with pytest.raises(ConfigError, match="did you mean 'transformer'"): panel("transfomer")


def test_stopped_in_an_evaluation_and_resumed_equals_never_stopped(small, tmp_path, monkeypatch):
    make_trainer(configure("transformer", {**small, "output_dir": str(tmp_path / "whole")}),
                 log=lambda words: None).train()
    p = panel("transformer", **small)
    evaluate, stopped_at = Trainer.evaluate, []

    def evaluate_and_stop(trainer, limit=None):
        if trainer.step in (0, 40) and trainer.step not in stopped_at:
            stopped_at.append(trainer.step)
            p.stop()
        return evaluate(trainer, limit)
    monkeypatch.setattr(Trainer, "evaluate", evaluate_and_stop)
    p.run()
    assert (p.wait(30) and p.state == "stopped" and p.trainer.step == 0
            and p.message.startswith("at step 0"))
    assert json.loads((tmp_path / "run/experiment_summary.json").read_text())["state"] == "stopped"
    p.resume()
    assert p.wait(30) and p.state == "stopped" and p.trainer.step == 40 and p.model is not None
    p.resume()
    assert p.wait(30) and p.state == "finished", p.message
    for log in ("logs/training_log.csv", "logs/eval_log.csv"):
        whole, mine = read_log(tmp_path / "whole" / log), read_log(tmp_path / "run" / log)
        for column in ("step", "loss", "bits_per_byte"):
            assert whole[column] == mine[column], (log, column)
    assert (tmp_path / "run/checkpoints/best").resolve().name == (tmp_path / "whole/checkpoints/best").resolve().name


def until(condition, seconds: float = 30) -> None:
    "Wait for a condition, looked at every hundredth of a second."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_run_stop_resume_reset(small, tmp_path):
    p = panel("transformer", **{**small, "max_steps": 100_000})
    threads = threading.active_count()
    p.run()
    p.run()   # a second click does nothing
    assert threading.active_count() <= threads + 1
    until(lambda: p.trainer is not None and p.trainer.step > 25)
    assert p.running and not p.wait(0.01)
    assert p.buttons["Run"].disabled and p.buttons["Resume"].disabled
    assert not p.buttons["Stop"].disabled
    p.stop()
    assert p.wait(10) and p.state == "stopped"
    step, model = p.trainer.step, p.model
    assert step in p.trainer.run.steps() and "what it writes" in p.view.sample.value
    assert p.buttons["Stop"].disabled
    assert not p.buttons["Run"].disabled and not p.buttons["Resume"].disabled
    assert p.folder == tmp_path / "run"
    p.resume()
    until(lambda: p.trainer is not None and p.trainer.step > step)
    assert p.model is not model and p.folder == tmp_path / "run"
    p.stop()
    assert p.wait(10)
    # from the beginning once more: the folder is taken, and the next one is free
    p.run()
    until(lambda: p.trainer is not None and p.trainer.step > 2)
    assert p.trainer.step < step and p.trainer.run.folder == tmp_path / "run-2"
    p.reset()   # while it runs
    assert p.wait(10) and p.state == "ready" and p.model is None
    assert p.controls["max_steps"].value == 100_000
    offers = [folder for _, folder in p.shown.offer.options]
    assert offers == [str(tmp_path / "run"), str(tmp_path / "run-2")]


def test_a_click_of_stop_is_never_lost(small):
    "However early it comes: while the data is read, in the first evaluation, after any step."
    p = panel("transformer", **{**small, "max_steps": 100_000, "eval_interval": 1})
    for delay in (0, 0.002, 0.01, 0.03, 0.1):
        p.run()
        time.sleep(delay)
        p.stop()
        assert p.wait(20) and p.state == "stopped", (delay, p.state, p.message)


def test_two_clicks_at_once_do_not_mix(small):
    p = panel("transformer", **small)

    def move(preset):
        for _ in range(2):
            p.preset.value = preset
            p.reset()
    movers = [threading.Thread(target=move, args=(preset,), daemon=True)
              for preset in ("mini", "small", "base")]
    for mover in movers: mover.start()
    for mover in movers: mover.join(30)
    assert not any(mover.is_alive() for mover in movers), "two locks wait for each other"
    p.reset()
    assert p.config().to_dict() == panel("transformer", **small).config().to_dict()


def test_a_finished_run_goes_on_with_more_steps_only(small):
    p = panel("transformer", **{**small, "max_steps": 20})
    p.run()
    assert p.wait(30) and p.state == "finished"
    p.resume()
    assert p.wait(30) and p.state == "failed" and "raise max_steps" in p.message
    p.set(max_steps=30)
    p.resume()
    assert p.wait(30) and p.state == "finished" and p.trainer.step == 30
    assert [row["step"] for row in p.live.record.validation] == [0, 20, 30]


def test_playground_and_its_mistakes(small):
    p = panel("transformer", **{**small, "max_steps": 20, "max_position_embeddings": 64})
    play = playground(p, max_tokens=12, seed=0, prompt="To be")
    play.write()
    assert play.wait(10) and play.state == "failed" and "no model yet" in play.message
    p.run()
    play.write()
    play.wait(10)
    assert play.state == "failed" and ("is training" in play.message
                                       or "no model yet" in play.message)
    p.wait(30)
    play.write()
    assert (play.wait(30) and play.state == "ready"
            and play.page.value.count("<input") == len([piece for piece in play.pieces
                                                        if piece.surprise]))
    play.controls["max_tokens"].value = 10**6
    play.write()
    assert play.wait(30) and play.state == "failed" and "max_position_embeddings=64" in play.message
    with pytest.raises(ConfigError, match="give its tokenizer"): playground(p.model)
    play = playground(str(p.trainer.run.folder), max_tokens=5)
    play.prompt.value = "<b>&"
    play.write()
    assert play.wait(30) and play.state == "ready" and "&lt;b&gt;&amp;" in play.page.value


def test_stop_while_writing(small):
    p = panel("transformer", **{**small, "max_steps": 1})
    p.run(), p.wait(30)
    play = playground(p, max_tokens=1500, temperature=1.0)
    play.write()
    while not play.pieces: assert play.running
    play.stop()
    assert (play.wait(5) and play.state == "ready" and "stopped" in play.message
            and 0 < len(play.pieces) < 1500)


def test_compare_survives_what_is_no_run(small, tmp_path):
    for name, width in (("a", 32), ("b", 64)):
        p = panel("transformer", **{**small, "hidden_size": width, "max_steps": 2,
                                    "output_dir": str(tmp_path / name)})
        p.run(), p.wait(30)
    (tmp_path / "c").mkdir()
    c = compare(tmp_path, ["a", "b"])
    assert config_differences(c.choice.value) == {"hidden_size": {"a": 32, "b": 64}}
    with pytest.raises(ConfigError, match="no such run"): compare(tmp_path, ["c"])
    with pytest.raises(ConfigError, match="is not a run"): config_differences([tmp_path / "c"])
    (tmp_path / "a/config.yaml").write_text("model: [")
    c.choice.value = c.choice.value[::-1]
    assert "not valid YAML" in c.table.value and c.pictures.value == ""


class Spoken(list):
    def __call__(self, *words): self.append(" ".join(words))


def test_live_in_a_terminal_and_in_ci(small, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("CI", raising=False)
    spoken = Spoken()
    live = Live()
    make_trainer(configure("transformer",
                           {**small, "max_steps": 20, "output_dir": str(tmp_path / "terminal")}),
                 extra_callbacks=[live], log=spoken).train()
    # the trainer's own lines, once each
    assert live.where == "terminal" and sum("bits per byte" in line for line in spoken) == 2
    monkeypatch.setenv("CI", "true")
    live = Live()
    make_trainer(configure("transformer",
                           {**small, "max_steps": 20, "output_dir": str(tmp_path / "ci")}),
                 extra_callbacks=[live], log=lambda words: None).train()
    assert live.where == "silent" and live.screen.cell.handles is None
    assert capsys.readouterr().out == ""


LONG = """
import threading
from sprout_lab.families import configure, make_trainer
from sprout_lab.panels.live import Live
from sprout_lab.trainers.callbacks import Evaluate, Logs
def train(folder, steps, live):
    run = configure("transformer", {**%r, "max_steps": steps, "output_dir": folder})
    make_trainer(run, callbacks=[Logs(), Evaluate()], extra_callbacks=[live], log=lambda words: None).train()
"""


def test_two_thousand_steps_leave_a_small_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(root))
    settings = {**SMALL, "hidden_size": 16, "sequence_length": 16, "batch_size": 2,
                "eval_interval": 50, "eval_batches": 1, "log_interval": 5}
    cells = [LONG % settings, f"live = Live()\ntrain({str(tmp_path / 'long')!r}, 2000, live)",
             "live",
             f"second = Live()\nthread = threading.Thread(target=train, "
             f"args=({str(tmp_path / 'thread')!r}, 100, second))\nthread.start(); thread.join()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    size = len(nbformat.writes(notebook).encode())
    kinds = [[next(iter(set(o.get("data", {})) & {"image/png", "text/html"}), o.output_type)
              for o in cell.outputs] for cell in notebook.cells]
    # a table and a figure; shown again by name; from a thread
    assert kinds == [[], ["text/html", "image/png"], ["text/html", "image/png"],
                     ["text/html", "image/png"]], kinds
    assert ("step 2,000 of 2,000" in notebook.cells[1].outputs[0].data["text/html"]
            and "finished" in notebook.cells[2].outputs[0].data["text/html"])
    assert size < 1_000_000, size


def test_no_notebook_carries_the_state_of_its_widgets():
    for path in root.glob("nbs/panels/*.ipynb"):
        assert "widgets" not in json.loads(path.read_text())["metadata"], (f"{path.name}: execute "
                                                                           f"it without storing "
                                                                           f"widget state")


ALLOWED = {"Select", "Tab", "Accordion", "BoundedIntText", "Button", "Checkbox", "Combobox",
           "Dropdown",
           "FloatLogSlider", "FloatSlider", "GridBox", "HBox", "HTML", "Image", "IntSlider",
           "Layout",
           # in ipywidgets 7.7 and 8.1 alike
           "SelectMultiple", "SelectionSlider", "Text", "Textarea", "VBox", "Widget"}


def test_only_widgets_that_both_versions_have():
    for path in (root / "sprout_lab/panels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value,
                                                              ast.Name) and node.value.id == "widgets":
                assert node.attr in ALLOWED, (path.name, node.attr)
            if isinstance(node, ast.With):
                assert not any("out" == getattr(item.context_expr, "id", "")
                               for item in node.items), path.name
            if isinstance(node, ast.Call) and isinstance(node.func,
                                                         ast.Attribute) and getattr(node.func.value,
                                                                                    "id",
                                                                                    "") == "widgets":
                keywords = {k.arg for k in node.keywords}
                assert not keywords & {"titles", "description_allow_html", "description_tooltip",
                                       "tabbable"}, (path.name, keywords)
                assert "tooltip" not in keywords or node.func.attr == "Button", path.name


@pytest.mark.slow   # runs all of this file under ipywidgets 7
def test_the_other_major_version(small):
    """With a folder that holds another ipywidgets: pip install --no-deps --target DIR
    ipywidgets==7.7.1 ipython_genutils."""
    folder = os.environ.get("SPROUT_LAB_IPYWIDGETS7")
    if not folder or not Path(folder, "ipywidgets").is_dir():
        pytest.skip("needs $SPROUT_LAB_IPYWIDGETS7, a folder with ipywidgets 7.7")
    code = f"""import ipywidgets
from sprout_lab.panels import compare, panel, playground
assert ipywidgets.__version__.startswith("7."), ipywidgets.__version__
p = panel("transformer", **{ {**small, 'max_steps': 20}!r})
p.preset.value = "mini"; p.reset(); p.run(); p.wait(); assert p.state == "finished", p.message
p.set(max_steps=30); p.resume(); p.wait(); assert p.trainer.step == 30, p.message
play = playground(p, max_tokens=10); play.write(); play.wait(); assert play.state == "ready", play.message
assert compare({str(Path(small['output_dir']).parent)!r}, ["run"]).table.value
print(p.box._repr_mimebundle_ if hasattr(p.box, "_repr_mimebundle_") else p.box._ipython_display_)"""
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
                          env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"},
                          capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_mistake_in_a_notebook_is_one_line_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    cells = ["from sprout_lab.configs import ConfigError, "
             "TrainingConfig\nTrainingConfig(learning_rate=-1)",
             "1 / 0"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3",
                   allow_errors=True).execute(cwd=str(tmp_path))
    (mine,), (other,) = (cell.outputs for cell in notebook.cells)
    assert len(mine.traceback) == 1 and "\n" not in mine.traceback[0]
    assert "learning_rate=-1" in mine.traceback[0] and mine.ename == "ConfigError"
    assert len(other.traceback) > 1            # a fault of the program is told with its frames
