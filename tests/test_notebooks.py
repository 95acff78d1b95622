"""Notebooks as files: small, clean, and the guides run top to bottom in a real kernel."""
import json
import os
import re
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for folder in ("nbs", "colab")
                   for p in (root / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
GUIDES = sorted((root / "nbs/guides").glob("*.ipynb"))
WORDS_AND_TABLES = ("serve", "many_gpus")   # guides about what has no picture
LARGEST = 1_000_000
# a warning as Python prints it, a traceback, a bar that stood still, a path of the machine that ran it
UNWANTED = re.compile(r"\b\w*Warning: |it/s\]|\bWARNING\b|Traceback \(most recent call "
                      r"last\)|/(?:work|root|home|tmp|Users|site-packages)/[\w.-]+")


def outputs(notebook) -> list[dict]:
    return [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]


def readable(output: dict) -> str:
    "What a reader sees of an output as text; pictures left out."
    parts = [output.get("text", ""),
             *(value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))]
    return "\n".join("".join(part) for part in parts)


def problems(notebook) -> list[str]:
    "What must not stand in a notebook's outputs."
    found = []
    for output in outputs(notebook):
        if output["output_type"] == "error": found.append(f"an error: {output['ename']}")
        if output.get("name") == "stderr":
            found.append(f"on standard error: {''.join(output['text'])[:200]}")
        found += [f"{unwanted!r} in an output" for unwanted in UNWANTED.findall(readable(output))]
    return found


def test_what_is_unwanted_is_seen():
    def said(text, **more):
        return {"cells": [{"cell_type": "code",
                           "outputs": [{"output_type": "stream", "name": "stdout", "text": text,
                                        **more}]}]}
    for text in ("x.py:1: UserWarning: no", "Traceback (most recent call last)", "runs in /tmp/abc",
                 "/home/me/x"):
        assert problems(said(text)), text
    assert problems(said("fine", name="stderr")) and not problems(said("3.1 bits per byte, "
                                                                       "runs/demo, and/or"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(root).as_posix())
def test_files(path):
    assert path.stat().st_size <= LARGEST, (f"{path.stat().st_size:,} bytes; smaller figures, or "
                                            f"fewer")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert problems(notebook) == []


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_a_guide_is_kept_as_it_ran(path):
    "A guide is read more often than it is run: its outputs are in it, pictures included."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    kinds = {kind for o in outputs(notebook) for kind in o.get("data", {})}
    how = "run it (jupyter execute --inplace) and clean it (nbdev-clean)"
    assert outputs(notebook), how
    assert "image/png" in kinds or path.stem in WORDS_AND_TABLES, how


@pytest.mark.slow   # two to three minutes of training for each
@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_a_guide_runs_top_to_bottom(path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    monkeypatch.delenv("CI", raising=False)   # live progress is part of it
    monkeypatch.setenv("PYTHONPATH",
                       os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}}).execute()
    assert problems(notebook) == []
    assert len(nbformat.writes(notebook)) <= LARGEST
