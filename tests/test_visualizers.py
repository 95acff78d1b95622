"""Figures: what they draw of the data, on any paper, from any data; they leave nothing behind."""
import gc
import math
import re
import subprocess
import sys
import warnings
import weakref
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb

from sprout_lab.configs import ConfigError
from sprout_lab.runs import read_log
from sprout_lab.visualizers.attention import attention_array, plot_attention
from sprout_lab.visualizers.curves import (columns, plot_ablations, plot_bits_per_byte,
                                           plot_comparison, plot_schedule)
from sprout_lab.visualizers.embeddings import plot_embeddings, principal_components
from sprout_lab.visualizers.health import plot_health
from sprout_lab.visualizers.chunks import (plot_boundaries, plot_boundaries_by_position,
                                           plot_chunk_lengths, plot_half_lives,
                                           plot_ternary_weights)
from sprout_lab.visualizers.style import (DASHES, MARKERS, PALETTE, STYLES, _inks, contrast,
                                          get_style, inked, line_style, new_figure, spread,
                                          visible)
from sprout_lab.visualizers.surprise import plot_surprise, surprise_html
from sprout_lab.visualizers.tree import (plot_compatibility, plot_destinations, plot_growth,
                                         plot_tree)


def run(steps=50, end=2.0, offset=0.0):
    t = np.arange(1, steps + 1)
    y = end + 6 * np.exp(-t / 10) + offset
    return {"train": {"step": t, "tokens": t * 100, "elapsed_seconds": t / 10, "bits_per_byte": y},
            "validation": {"step": t[9::10], "tokens": t[9::10] * 100,
                           "elapsed_seconds": t[9::10] / 10, "bits_per_byte": y[9::10]}}


HEALTH = [dict(layer=f"block {i}", activation_rms=1.0 + i, gradient_rms=1e-3,
               gradient_to_weight=0.1, zero_fraction=0.0) for i in range(4)]
EVERY_FIGURE = {
    "curve": lambda: plot_bits_per_byte(run(), {"gzip": 3.11}),
    "curves": lambda: plot_bits_per_byte({"a": [run(), run(offset=0.1)], "b": run(end=2.5)},
                                         {"gzip": 3.11, "bzip2": 2.36}, x="seconds"),
    "schedule": lambda: plot_schedule([0.1, 1.0, 0.5]),
    "comparison": lambda: plot_comparison({"a": {"bits_per_byte": 2.0, "accuracy": 0.5,
                                                 "top5_accuracy": 0.8}}),
    "ablations": lambda: plot_ablations({"full": [2.0, 2.1], "less": 2.5}),
    "attention": lambda: plot_attention(np.tril(np.ones((2, 3, 5, 5))), "abcde"),
    "one head": lambda: plot_attention(np.tril(np.ones((2, 3, 5, 5))), "abcde", layer=1, head=-1),
    "embeddings": lambda: plot_embeddings(np.eye(6), "ab\n $€", groups=["x", "y"] * 3),
    "health": lambda: plot_health(HEALTH),
    "surprise": lambda: plot_surprise("some text\n$狐", [1.0] * 12),
    "boundaries": lambda: plot_boundaries(b"a line\nand more", np.linspace(0, 1, 15)),
    "half-lives": lambda: plot_half_lives([np.arange(1.0, 9.0), np.arange(3.0, 30.0)]),
    "ternary": lambda: plot_ternary_weights({"a": np.linspace(-2, 2, 99), "b": np.ones(9)}),
    "by position": lambda: plot_boundaries_by_position([0.1, 0.9, 0.2], 0.3),
    "chunk lengths": lambda: plot_chunk_lengths([1, 2, 3], [1.0, 2.0, 3.0], 4.0, [0.1, 0.1, 0.1]),
    "tree": lambda: plot_tree([-1, 0, 0, 1], [8, 5, 3, 0], ["", "$x$", "狐", ""], highlight=[1]),
    "growth": lambda: plot_growth([{"step": 1, "tree": [-1]}, {"step": 2, "tree": [-1, 0, 0]}]),
    "compatibility": lambda: plot_compatibility({0: ([1, 2], [0], [[0.9, 0.3]])}, 1, [-1, 0, 0]),
    "destinations": lambda: plot_destinations([[0, 0], [1, 2]], ["a", "b"]),
}
ON_COLOR = ("tree", "growth", "destinations")   # their numbers stand on colours, not on paper


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
    for _ in range(2): gc.collect()                  # pandas lets go only when its own tables went
    assert gone() is None, "something keeps the figure alive"


ALONE = """
import sys, importlib, pkgutil, sprout_lab.visualizers as v
for m in pkgutil.iter_modules(v.__path__):
    importlib.import_module("sprout_lab.visualizers." + m.name)
from sprout_lab.visualizers.curves import plot_schedule, plot_bits_per_byte
plot_schedule([1, 2]).png()
log = {"step": [1, 2], "tokens": [1, 2], "bits_per_byte": [3, 2]}
plot_bits_per_byte({"train": log}).svg()
print(*(name in sys.modules for name in ("matplotlib.pyplot", "torch", "seaborn", "pandas")))
sys.modules["seaborn"] = None                       # as where it is not installed
try: plot_bits_per_byte({"two seeds": [{"train": log}, {"train": log}]})
except v.style.ConfigError as error: print(error)
"""


def test_a_single_run_needs_no_seaborn_and_no_pyplot():
    shown = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True,
                           cwd=Path(__file__).parent.parent)
    flags, missing = shown.stdout.splitlines()
    assert flags == "False False False False" and "pip install seaborn" in missing, shown.stderr


def test_seaborn_registers_no_figure_and_changes_no_setting():
    import matplotlib.pyplot
    for name in ("curves", "ablations", "half-lives"): EVERY_FIGURE[name]().png()
    assert matplotlib.pyplot.get_fignums() == []


def test_figures_from_several_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool:
        figures = list(pool.map(lambda i: plot_bits_per_byte(run(), title=f"run {i}"), range(8)))
    assert [f.axes[0].get_title(loc="left") for f in figures] == [f"run {i}" for i in range(8)]


# ---- style --------------------------------------------------------------------------------------
# -------------------------

def _seen(color: str, matrix) -> np.ndarray:
    "A colour in CIE Lab, as someone with a colour-vision deficiency sees it."
    rgb = np.array([int(color[k:k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(matrix @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                    [0.0193, 0.1192, 0.9505]]) @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency" (2009), severity 1.0
VISION = {"full": np.eye(3),
          "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                                  [-0.003882, -0.048116, 1.051998]]),
          "deuteranopia": np.array([[0.367322, 0.860646, -0.227968],
                                    [0.280085, 0.672501, 0.047413],
                                    [-0.011820, 0.042940, 0.968881]]),
          "tritanopia": np.array([[1.255528, -0.076749, -0.178779],
                                  [-0.078411, 0.930809, 0.147602],
                                  [0.004733, 0.691367, 0.303900]])}


@pytest.mark.parametrize("style", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_the_first_four_colours_can_be_told_apart(vision, style):
    seen = [_seen(c, VISION[vision]) for c in STYLES[style].palette[:4]]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(distances) > 15, f"{min(distances):.1f}"


def test_every_series_differs_in_more_than_colour():
    for i in range(len(PALETTE)):
        for j in range(i):
            a, b = line_style(i, marker=True), line_style(j, marker=True)
            assert a["marker"] != b["marker"] and a["color"] != b["color"]
    assert len({str(line_style(i)["linestyle"])
                for i in range(4)}) == 4 == len(DASHES) and len(MARKERS) >= len(PALETTE)


def _shown(figure, style: str) -> list[tuple[str, float, bool]]:
    "(text, contrast to what lies behind it, on a shade or not) of every text as drawn in `style`."
    paper = np.array(to_rgb(STYLES[style].paper))
    with inked(figure, get_style(style)):
        found = []
        for ax in figure.axes:
            areas = [(p.get_window_extent(), p.get_facecolor()) for p in ax.patches]
            for text in [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label,
                         ax.yaxis.label, ax.title]:
                if not text.get_visible() or not text.get_text().strip(): continue
                x, y = text.get_window_extent().get_points().mean(0)
                behind, alpha = paper, 0.0
                for box, (*rgb, a) in areas:
                    if box.contains(x, y):
                        behind, alpha = a * np.array(rgb) + (1 - a) * behind, max(alpha, a)
                found.append((text.get_text(), contrast(to_rgb(text.get_color()), behind),
                              alpha > 0))
    return found


@pytest.mark.parametrize("name", [name for name in EVERY_FIGURE if name not in ON_COLOR])
def test_every_word_can_be_read_on_both_papers(name):
    figure = EVERY_FIGURE[name]()
    figure.draw_without_rendering()
    # these name things in their own colours
    least = 2.9 if name in ("embeddings", "half-lives") else 4.4
    for style in ("light", "dark"):
        shown = sorted(_shown(figure, style), key=lambda s: s[1])
        assert shown and shown[0][1] > least, (style, shown[:3])


def _colors(figure) -> list:
    return [np.asarray(color).round(6).tolist() for artist in figure.findobj()
            for _, color in _inks(artist)]


@pytest.mark.parametrize("name", EVERY_FIGURE)
def test_a_style_changes_no_figure_for_good(name):
    figure = EVERY_FIGURE[name]()
    light, composed = figure.png(dpi=40), _colors(figure)
    figure.style = "dark"
    dark, page = figure.png(dpi=40), figure.svg()
    assert _colors(figure) == composed and dark != light and figure.style == "dark"
    assert "currentColor" in page and "#00000" not in page and len(page) < 400_000
    inside = ElementTree.fromstring(page)
    assert inside.get("width") == "100%" and not [e for e in inside.iter() if "script" in e.tag
                                                  or any(a.startswith("on") for a in e.keys())]


def test_style_is_a_keyword_of_every_figure_function():
    import importlib
    import inspect
    import pkgutil

    import sprout_lab.visualizers as rooms
    for room in pkgutil.iter_modules(rooms.__path__):
        module = importlib.import_module(f"sprout_lab.visualizers.{room.name}")
        for name in module.__all__:
            if name.startswith("plot_"):
                assert inspect.signature(getattr(module,
                                                 name)).parameters["style"].default == "light", name
    with pytest.raises(ConfigError, match="did you mean 'dark'"):
        plot_surprise("a", [1.0], style="drak")


def test_a_page_shows_values_under_the_mouse():
    page = plot_bits_per_byte({"a": run(), "b": run(end=2.5)}, x="step",
                              earlier={"size <64>": run(end=3.0)}).svg()
    assert page.count('class="sprout-hover"') == 50
    assert "step 50" in page and "a validation 2.04" in page and "size &lt;64&gt; 3.04" in page
    assert new_figure()[0].svg().count("sprout-hover") == 0


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_and_gaps(seed):
    values = np.random.default_rng(seed).normal(size=seed + 1)
    moved = spread(values, 0.3)
    assert (np.diff(moved[np.argsort(values, kind="stable")]) >= 0.3 - 1e-9).all()
    assert math.isclose(moved.mean(), values.mean(), abs_tol=1e-9)


@pytest.mark.parametrize("text", ["plain", "tab\tand\r\n", "$x$", "狐🦊", "\x00\x1b", "", "é\u0301",
                                  "\u202e"])
def test_visible_is_always_drawable(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_embeddings(np.eye(3), [text, "a", "b"]).png()
    assert visible(text)


# ---- curves -------------------------------------------------------------------------------------
# -------------------------

def test_curve_draws_the_numbers_of_the_log():
    ax = plot_bits_per_byte(run(), x="step").axes[0]
    train, validation = ax.lines[:2]
    assert np.allclose(train.get_xdata(), np.arange(1, 51))
    assert np.allclose(validation.get_ydata(), run()["validation"]["bits_per_byte"])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["training 2.04",
                                                                   "validation 2.04"]


def test_log_files_with_empty_cells_and_torn_ends(tmp_path):
    torn = "step,tokens,bits_per_byte\n1,100,5.0\n2,200,\n3,300,nan\n4,400,4.0\n5,50"
    (tmp_path / "log.csv").write_text(torn)
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
    whole, cut = (r["validation"]["bits_per_byte"] for r in (run(50), short))
    expected = (whole[:3] + cut) / 2
    assert np.allclose(validation.get_ydata(), expected)
    assert len(ax.collections) == 2
    assert "band: lowest to highest seed" in ax.get_legend().get_title().get_text()


def test_long_logs_are_averaged_not_cut():
    steps = np.arange(100_000)
    ax = plot_bits_per_byte({"train": {"step": steps, "bits_per_byte": steps % 2 + 2.0}},
                            x="step").axes[0]
    assert len(ax.lines[0].get_xdata()) == 400
    assert np.allclose(ax.lines[0].get_ydata(), 2.5, atol=0.01)


def test_baselines_are_dashed_named_and_apart():
    ax = plot_bits_per_byte(run(), {"gzip": 3.11, "bzip2": 2.36, "best known": 2.35}).axes[0]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"
              or "axes" in str(line.get_transform()).lower() and len(set(line.get_ydata())) == 1]
    assert {round(float(line.get_ydata()[0]), 2) for line in dashed} >= {3.11, 2.36, 2.35}
    heights = sorted(t.xyann[1] for t in ax.texts)
    low, high = ax.get_ylim()
    assert min(np.diff(heights)) >= 0.05 and low < 2.35 and high > 3.11


@pytest.mark.parametrize("runs", [{"train": [], "validation": []}, {"train": {}, "validation": {}},
                                  {"a": []}, {},
                                  {"validation": {"tokens": [1], "bits_per_byte": [8.0]}},
                                  {"train": {"tokens": [1, 2],
                                             "bits_per_byte": [float("nan")] * 2}},
                                             {"train": {"tokens": [1, 2],
                                                        "bits_per_byte": [3.0, 3.0]}}])
def test_curve_of_almost_nothing(runs):
    plot_bits_per_byte(runs).png()
    plot_bits_per_byte(runs, {"gzip": 3.11}).png()


@pytest.mark.parametrize("call, says", [
    (lambda: plot_bits_per_byte(run(), x="token"), "did you mean 'tokens'"),
    (lambda: plot_bits_per_byte({"a": {"losses": []}}), "'train' or a 'validation'"),
    (lambda: plot_bits_per_byte(run(), metric="bpb"), "no column 'bpb'"),
    (lambda: plot_comparison({}), "no rows"),
    (lambda: plot_comparison({"a": {"los": 1}}, metrics=("loss",)), "did you mean 'los'"),
    (lambda: plot_ablations({}), "no results"), (lambda: plot_ablations({"a": 1.0}, reference="b"),
                                                 "no such variant"),
                                                 (lambda: plot_attention(np.ones((2, 2)), "abc"),
                                                  "3 tokens for maps over 2"),
                                                  (lambda: plot_attention((None,), "a"),
                                                   "no attention"),
    (lambda: plot_attention(np.ones((3, 2, 2)), "ab", head=3), "head=3"),
    (lambda: attention_array(np.ones(3)), "cannot be drawn"),
    (lambda: plot_embeddings(np.ones(3)), "cannot be projected"),
    (lambda: plot_embeddings(np.full((2, 2), np.nan)), "not finite"),
    (lambda: plot_embeddings(np.ones((2, 2)), ["a"]), "1 labels for 2 rows"),
    (lambda: plot_health([]), "no layers"), (lambda: plot_health([{"layer": "a"}]),
                                             "none of the columns"),
                                             (lambda: plot_surprise("ab", [1.0]),
                                              "one number for each"),
                                              (lambda: surprise_html("ab", [1.0, 2.0],
                                                                     alternatives=[[]]),
                                                                     "one for each"),
])
def test_wrong_data_is_answered_in_one_line(call, says):
    with pytest.raises(ConfigError) as error: call()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_comparison_marks_the_best_of_each_and_tells_what_is_missing():
    table = [{"name": "a", "loss": 2.0, "accuracy": 0.4}, {"name": "b", "loss": 1.5,
                                                           "accuracy": 0.3},
                                                           {"name": "c", "loss": None,
                                                            "accuracy": float("inf")}]
    loss, accuracy = plot_comparison(table, metrics=("loss", "accuracy")).axes
    bold = lambda ax: [t.get_text() for t in ax.texts if t.get_fontweight() == "bold"]
    assert bold(loss) == ["1.500"] and bold(accuracy) == ["40.0%"]
    assert any("not measured" in t.get_text()
               for t in loss.texts) and any("not finite" in t.get_text() for t in accuracy.texts)
    assert [t.get_text() for t in loss.get_yticklabels()] == ["a", "b", "c"]


def test_ablations_show_every_seed_and_the_deviation():
    results = {"full": [2.0, 2.2], "given": {"mean": 2.4, "std": 0.1}, "gone": [float("nan"), 2.0]}
    ax = plot_ablations(results).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["full", "given", "gone"]
    dots = [float(x) for c in ax.collections if isinstance(c, PathCollection)
            for x, _ in c.get_offsets()]
    assert sorted(dots) == [2.0, 2.0, 2.2]
    means = {float(c.lines[0].get_xdata()[0]): c.has_xerr for c in ax.containers}
    assert {round(m, 9): e for m, e in means.items()} == {2.1: True, 2.4: True}
    assert any("diverged" in t.get_text() for t in ax.texts) and any("+0.300" in t.get_text()
                                                                     for t in ax.texts)


# ---- attention, embeddings, health
# ---------------------------------------------------------------------------------------

def test_attention_of_the_real_model():
    from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM
    model = TransformerForCausalLM(TransformerConfig(hidden_size=32, num_hidden_layers=3,
                                                     num_attention_heads=2,
                                                     max_position_embeddings=32)).eval()
    with torch.no_grad():
        attentions = model(torch.randint(256, (2, 9)), output_attentions=True).attentions
    maps = attention_array(attentions, row=1)
    assert maps.shape == (3, 2, 9, 9) and np.allclose(maps.sum(-1), 1, atol=1e-5)
    figure = plot_attention(attentions, "some text", row=1)
    assert len(figure.axes) == 3 * 2 + 1
    hidden = np.ma.getmaskarray(figure.axes[0].collections[0].get_array()).reshape(9, 9)
    assert np.array_equal(hidden, np.triu(np.ones((9, 9), bool),
                                          1)), "the future is blank, nothing else"


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
    assert np.allclose(principal_components(matrix.flip(0), min(shape))[0][::-1][:, 0],
                       coordinates[:, 0], atol=1e-4), "no flip with the order of rows"


def test_health_marks_what_is_not_finite_and_what_is_dead():
    rows = [dict(HEALTH[0]), {**HEALTH[1], "gradient_rms": float("nan")},
            {**HEALTH[2], "gradient_rms": 0.0}, {**HEALTH[3], "gradient_rms": None}]
    gradient = plot_health(rows).axes[1]
    markers = [line.get_marker() for line in gradient.lines]
    assert markers.count("x") == markers.count("<") == 1
    assert len(gradient.lines[0].get_xdata()) == 1
    low, high = gradient.get_xlim()
    assert math.log10(high / low) >= 2


# ---- surprise -----------------------------------------------------------------------------------
# -------------------------

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


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "&amp; \"quotes\" 'single'",
                                  "狐🦊 naïve", "a\nb\r\nc", "</pre><b>"])
def test_html_holds_the_text_and_never_its_markup(text):
    page = surprise_html(text, [1.0] * len(text), alternatives=[[(text, 0.5)]] * len(text))
    reader = _Reader()
    reader.feed(page)
    assert reader.text == text.replace("\r", "␍").replace("\n",
                                                          "⏎\n") and set(reader.tags) == {"div",
                                                                                          "pre",
                                                                                          "span"}
    assert all(set(a) <= {"style", "title"} for a in reader.attributes)
    assert len(re.findall("<span style=\"background:rgba", page)) == len(text)


def test_surprise_accepts_tensors_and_tokens_and_wraps():
    pieces = ["The", " cat", " sat", "\n", " on", " a mat"]
    figure = plot_surprise(pieces, torch.tensor([1.0, 2.0, 3.0, float("nan"), 0.1, 9.0]), width=8)
    cells = [(p.get_x(), round(p.get_y() - 0.05), p.get_width()) for p in figure.axes[0].patches]
    # none for the line break: not predicted
    assert cells == [(0, 0, 3), (3, 0, 4), (0, 1, 4), (0, 2, 3), (0, 3, 6)]
    assert "mean 4.36 per piece" in figure.axes[1].get_xlabel()


def test_surprise_shades_grow_with_the_surprise():
    page = surprise_html("abcd", [0.0, 1.0, 3.0, 50.0], highest=8)
    alphas = [float(a) for a in re.findall(r'style="background:rgba\(0,114,179,([\d.]+)\)', page)]
    assert len(alphas) == 4 and alphas == sorted(alphas) and len(set(alphas)) == 4
    plot_surprise("", []).png()
