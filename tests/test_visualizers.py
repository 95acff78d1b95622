"""Figures: what they draw of the data, that they survive any data, and that they leave nothing behind."""
import gc
import math
import re
import subprocess
import sys
import warnings
import weakref
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from sprout_lab.configs import ConfigError
from sprout_lab.runs import read_log
from sprout_lab.visualizers.attention import attention_array, plot_attention
from sprout_lab.visualizers.curves import columns, plot_ablations, plot_bits_per_byte, plot_comparison, plot_schedule
from sprout_lab.visualizers.embeddings import plot_embeddings, principal_components
from sprout_lab.visualizers.health import plot_health
from sprout_lab.visualizers.style import DASHES, MARKERS, PALETTE, line_style, spread, visible
from sprout_lab.visualizers.surprise import plot_surprise, surprise_html


def run(steps=50, end=2.0, offset=0.0):
    t = np.arange(1, steps + 1)
    y = end + 6 * np.exp(-t / 10) + offset
    return {"train": {"step": t, "tokens": t * 100, "elapsed_seconds": t / 10, "bits_per_byte": y},
            "validation": {"step": t[9::10], "tokens": t[9::10] * 100, "elapsed_seconds": t[9::10] / 10, "bits_per_byte": y[9::10]}}


HEALTH = [dict(layer=f"block {i}", activation_rms=1.0 + i, gradient_rms=1e-3, gradient_to_weight=0.1, zero_fraction=0.0) for i in range(4)]
EVERY_FIGURE = {
    "curve": lambda: plot_bits_per_byte(run(), {"gzip": 3.11}),
    "curves": lambda: plot_bits_per_byte({"a": [run(), run(offset=0.1)], "b": run(end=2.5)}, {"gzip": 3.11, "bzip2": 2.36}, x="seconds"),
    "schedule": lambda: plot_schedule([0.1, 1.0, 0.5]),
    "comparison": lambda: plot_comparison({"a": {"bits_per_byte": 2.0, "accuracy": 0.5, "top5_accuracy": 0.8}}),
    "ablations": lambda: plot_ablations({"full": [2.0, 2.1], "less": 2.5}),
    "attention": lambda: plot_attention(np.tril(np.ones((2, 3, 5, 5))), "abcde"),
    "one head": lambda: plot_attention(np.tril(np.ones((2, 3, 5, 5))), "abcde", layer=1, head=-1),
    "embeddings": lambda: plot_embeddings(np.eye(6), "ab\n $€", groups=["x", "y"] * 3),
    "health": lambda: plot_health(HEALTH),
    "surprise": lambda: plot_surprise("some text\n$狐", [1.0] * 12),
}


@pytest.mark.parametrize("name", EVERY_FIGURE)
def test_every_figure_draws_without_warning_and_leaves_nothing(name):
    settings = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = EVERY_FIGURE[name]()
        image = figure._repr_png_()
    assert image.startswith(b"\x89PNG") and len(image) < 200_000
    assert dict(matplotlib.rcParams) == settings
    gone = weakref.ref(figure)
    del figure
    gc.collect()
    assert gone() is None, "something keeps the figure alive"


def test_pyplot_is_never_imported():
    code = ("import sys, importlib, pkgutil, sprout_lab.visualizers as v\n"
            "for m in pkgutil.iter_modules(v.__path__): importlib.import_module('sprout_lab.visualizers.' + m.name)\n"
            "from sprout_lab.visualizers.curves import plot_schedule; plot_schedule([1, 2]).png()\n"
            "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert shown.stdout.split() == ["False", "False"]


def test_figures_from_several_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool:
        figures = list(pool.map(lambda i: plot_bits_per_byte(run(), title=f"run {i}"), range(8)))
    assert [f.axes[0].get_title(loc="left") for f in figures] == [f"run {i}" for i in range(8)]


# ---- style ---------------------------------------------------------------------------------------------------------------

def _seen(color: str, matrix) -> np.ndarray:
    "A colour in CIE Lab, as someone with a colour-vision deficiency sees it."
    rgb = np.array([int(color[k:k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(matrix @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009), severity 1.0
VISION = {"full": np.eye(3),
          "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
          "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
          "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]])}


@pytest.mark.parametrize("vision", VISION)
def test_the_first_four_colours_can_be_told_apart(vision):
    seen = [_seen(c, VISION[vision]) for c in PALETTE[:4]]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(distances) > 15, f"{min(distances):.1f}"


def test_every_series_differs_in_more_than_colour():
    for i in range(len(PALETTE)):
        for j in range(i):
            a, b = line_style(i, marker=True), line_style(j, marker=True)
            assert a["marker"] != b["marker"] and a["color"] != b["color"]
    assert len({str(line_style(i)["linestyle"]) for i in range(4)}) == 4 == len(DASHES) and len(MARKERS) >= len(PALETTE)


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_and_gaps(seed):
    values = np.random.default_rng(seed).normal(size=seed + 1)
    moved = spread(values, 0.3)
    assert (np.diff(moved[np.argsort(values, kind="stable")]) >= 0.3 - 1e-9).all()
    assert math.isclose(moved.mean(), values.mean(), abs_tol=1e-9)


@pytest.mark.parametrize("text", ["plain", "tab\tand\r\n", "$x$", "狐🦊", "\x00\x1b", "", "é\u0301", "\u202e"])
def test_visible_is_always_drawable(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_embeddings(np.eye(3), [text, "a", "b"]).png()
    assert visible(text)


# ---- curves --------------------------------------------------------------------------------------------------------------

def test_curve_draws_the_numbers_of_the_log():
    ax = plot_bits_per_byte(run(), x="step").axes[0]
    train, validation = ax.lines[:2]
    assert np.allclose(train.get_xdata(), np.arange(1, 51)) and np.allclose(validation.get_ydata(), run()["validation"]["bits_per_byte"])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["training 2.04", "validation 2.04"]


def test_log_files_with_empty_cells_and_torn_ends(tmp_path):
    (tmp_path / "log.csv").write_text("step,tokens,bits_per_byte\n1,100,5.0\n2,200,\n3,300,nan\n4,400,4.0\n5,50")
    log = read_log(tmp_path / "log.csv")
    line = plot_bits_per_byte({"validation": log}).axes[0].lines[0]
    assert line.get_xdata().tolist() == [100, 400] and line.get_ydata().tolist() == [5, 4]
    rows = columns([{"step": 1, "loss": None}, {"step": "2", "loss": "inf"}])
    assert rows["step"].tolist() == [1, 2] and math.isinf(rows["loss"][1])


def test_seeds_are_mean_and_extremes_where_all_have_been():
    short = run(30, offset=0.3)
    figure = plot_bits_per_byte({"family": [run(50), short]}, x="step")
    ax = figure.axes[0]
    validation = ax.lines[1]
    assert validation.get_xdata().max() == 30
    expected = (run(50)["validation"]["bits_per_byte"][:3] + short["validation"]["bits_per_byte"]) / 2
    assert np.allclose(validation.get_ydata(), expected)
    assert len(ax.collections) == 2 and "band: lowest to highest seed" in ax.get_legend().get_title().get_text()


def test_long_logs_are_averaged_not_cut():
    steps = np.arange(100_000)
    ax = plot_bits_per_byte({"train": {"step": steps, "bits_per_byte": steps % 2 + 2.0}}, x="step").axes[0]
    assert len(ax.lines[0].get_xdata()) == 400 and np.allclose(ax.lines[0].get_ydata(), 2.5, atol=0.01)


def test_baselines_are_dashed_named_and_apart():
    ax = plot_bits_per_byte(run(), {"gzip": 3.11, "bzip2": 2.36, "best known": 2.35}).axes[0]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--" or "axes" in str(line.get_transform()).lower() and len(set(line.get_ydata())) == 1]
    assert {round(float(line.get_ydata()[0]), 2) for line in dashed} >= {3.11, 2.36, 2.35}
    heights = sorted(t.xyann[1] for t in ax.texts)
    low, high = ax.get_ylim()
    assert min(np.diff(heights)) >= 0.05 * (high - low) and low < 2.35 and high > 3.11


@pytest.mark.parametrize("runs", [{"train": [], "validation": []}, {"train": {}, "validation": {}}, {"a": []}, {}, {"validation": {"tokens": [1], "bits_per_byte": [8.0]}},
                                  {"train": {"tokens": [1, 2], "bits_per_byte": [float("nan")] * 2}}, {"train": {"tokens": [1, 2], "bits_per_byte": [3.0, 3.0]}}])
def test_curve_of_almost_nothing(runs):
    plot_bits_per_byte(runs).png()
    plot_bits_per_byte(runs, {"gzip": 3.11}).png()


@pytest.mark.parametrize("call, says", [
    (lambda: plot_bits_per_byte(run(), x="token"), "did you mean 'tokens'"),
    (lambda: plot_bits_per_byte({"a": {"losses": []}}), "'train' or a 'validation'"),
    (lambda: plot_bits_per_byte(run(), metric="bpb"), "no column 'bpb'"),
    (lambda: plot_comparison({}), "no rows"), (lambda: plot_comparison({"a": {"los": 1}}, metrics=("loss",)), "did you mean 'los'"),
    (lambda: plot_ablations({}), "no results"), (lambda: plot_ablations({"a": 1.0}, reference="b"), "no such variant"),
    (lambda: plot_attention(np.ones((2, 2)), "abc"), "3 tokens for maps over 2"), (lambda: plot_attention((None,), "a"), "no attention"),
    (lambda: plot_attention(np.ones((3, 2, 2)), "ab", head=3), "head=3"), (lambda: attention_array(np.ones(3)), "cannot be drawn"),
    (lambda: plot_embeddings(np.ones(3)), "cannot be projected"), (lambda: plot_embeddings(np.full((2, 2), np.nan)), "not finite"),
    (lambda: plot_embeddings(np.ones((2, 2)), ["a"]), "1 labels for 2 rows"),
    (lambda: plot_health([]), "no layers"), (lambda: plot_health([{"layer": "a"}]), "none of the columns"),
    (lambda: plot_surprise("ab", [1.0]), "one number for each"), (lambda: surprise_html("ab", [1.0, 2.0], alternatives=[[]]), "one for each"),
])
def test_wrong_data_is_answered_in_one_line(call, says):
    with pytest.raises(ConfigError) as error: call()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_comparison_marks_the_best_of_each_and_tells_what_is_missing():
    table = [{"name": "a", "loss": 2.0, "accuracy": 0.4}, {"name": "b", "loss": 1.5, "accuracy": 0.3}, {"name": "c", "loss": None, "accuracy": float("inf")}]
    loss, accuracy = plot_comparison(table, metrics=("loss", "accuracy")).axes
    bold = lambda ax: [t.get_text() for t in ax.texts if t.get_fontweight() == "bold"]
    assert bold(loss) == ["1.500"] and bold(accuracy) == ["40.0%"]
    assert any("not measured" in t.get_text() for t in loss.texts) and any("not finite" in t.get_text() for t in accuracy.texts)
    assert [t.get_text() for t in loss.get_yticklabels()] == ["a", "b", "c"]


def test_ablations_show_every_seed_and_the_deviation():
    ax = plot_ablations({"full": [2.0, 2.2], "given": {"mean": 2.4, "std": 0.1}, "gone": [float("nan"), 2.0]}).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["full", "given", "gone"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert dots[0].get_xdata().tolist() == [2.0, 2.2]
    bars = [b for c in ax.containers for b in getattr(c, "patches", [])]
    assert math.isclose(bars[0].get_x() + bars[0].get_width(), 2.1)
    assert any("diverged" in t.get_text() for t in ax.texts) and any("+0.300" in t.get_text() for t in ax.texts)


# ---- attention, embeddings, health ---------------------------------------------------------------------------------------

def test_attention_of_the_real_model():
    from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM
    model = TransformerForCausalLM(TransformerConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32)).eval()
    with torch.no_grad(): attentions = model(torch.randint(256, (2, 9)), output_attentions=True).attentions
    maps = attention_array(attentions, row=1)
    assert maps.shape == (3, 2, 9, 9) and np.allclose(maps.sum(-1), 1, atol=1e-5)
    figure = plot_attention(attentions, "some text", row=1)
    assert len(figure.axes) == 3 * 2 + 1
    hidden = np.ma.getmaskarray(figure.axes[0].images[0].get_array())
    assert np.array_equal(hidden, np.triu(np.ones((9, 9), bool), 1)), "the future is blank, nothing else"


@pytest.mark.parametrize("length", [1, 65, 200])
def test_attention_of_any_length(length):
    plot_attention(np.tril(np.ones((length, length))), ["x"] * length, layer=0, head=0).png()


@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (3, 50), (256, 64)])
def test_principal_components_keep_the_variance(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coordinates, share = principal_components(matrix, min(shape))
    assert np.allclose(share.sum(), 1) and (np.diff(share) <= 1e-12).all()
    centred = matrix - matrix.mean(0)
    assert np.allclose(np.linalg.norm(coordinates, axis=1), centred.norm(dim=1), atol=1e-4)
    again, _ = principal_components(-(-matrix), min(shape))
    assert np.array_equal(coordinates, again)
    assert np.allclose(principal_components(matrix.flip(0), min(shape))[0][::-1][:, 0], coordinates[:, 0], atol=1e-4), "no flip with the order of rows"


def test_health_marks_what_is_not_finite_and_what_is_dead():
    rows = [dict(HEALTH[0]), {**HEALTH[1], "gradient_rms": float("nan")}, {**HEALTH[2], "gradient_rms": 0.0}, {**HEALTH[3], "gradient_rms": None}]
    gradient = plot_health(rows).axes[1]
    markers = [line.get_marker() for line in gradient.lines]
    assert markers.count("x") == 1 and markers.count("<") == 1 and len(gradient.lines[0].get_xdata()) == 1
    low, high = gradient.get_xlim()
    assert math.log10(high / low) >= 2


# ---- surprise ------------------------------------------------------------------------------------------------------------

class _Reader(HTMLParser):
    "The text and the tags of a piece of HTML."
    def __init__(self):
        super().__init__()
        self.text, self.tags, self.attributes, self.inside = "", [], [], False
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag), self.attributes.append(dict(attributes))
        self.inside = self.inside or tag == "pre"
    def handle_endtag(self, tag): self.inside = self.inside and tag != "pre"
    def handle_data(self, data): self.text += data if self.inside else ""


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "&amp; \"quotes\" 'single'", "狐🦊 naïve", "a\nb\r\nc", "</pre><b>"])
def test_html_holds_the_text_and_never_its_markup(text):
    page = surprise_html(text, [1.0] * len(text), alternatives=[[(text, 0.5)]] * len(text))
    reader = _Reader()
    reader.feed(page)
    assert reader.text == text.replace("\r", "␍").replace("\n", "⏎\n") and set(reader.tags) == {"div", "pre", "span"}
    assert all(set(a) <= {"style", "title"} for a in reader.attributes)
    assert len(re.findall("<span style=\"background:#", page)) == len(text)


def test_surprise_accepts_tensors_and_tokens_and_wraps():
    pieces = ["The", " cat", " sat", "\n", " on", " a mat"]
    figure = plot_surprise(pieces, torch.tensor([1.0, 2.0, 3.0, float("nan"), 0.1, 9.0]), width=8)
    cells = [(p.get_x(), round(p.get_y() - 0.04), p.get_width()) for p in figure.axes[0].patches]
    assert cells == [(0, 0, 3), (3, 0, 4), (0, 1, 4), (4, 1, 1), (0, 2, 3), (0, 3, 6)]
    assert "mean 4.36 per piece" in figure.axes[1].get_xlabel()


def test_surprise_shades_grow_with_the_surprise():
    page = surprise_html("abcd", [0.0, 1.0, 3.0, 50.0], highest=8)
    colors = re.findall(r'background:(#\w{6});color', page)
    light = [sum(int(c[k:k + 2], 16) for k in (1, 3, 5)) for c in colors]
    assert light == sorted(light, reverse=True) and len(set(light)) == 4
    plot_surprise("", []).png()
