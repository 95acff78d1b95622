"""The documentation: it builds in silence, its links lead somewhere, it loads nothing from the
network, formulas and the API are in it."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def docs():
    sys.path.insert(0, str(root / "tools"))
    try: import docs
    finally: sys.path.pop(0)
    return docs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built by a process of its own, as `make docs` does it, at another place."
    folder = tmp_path_factory.mktemp("docs")
    code = (f"import sys, pathlib\nsys.path.insert(0, {str(root / 'tools')!r})\nimport "
            f"docs\ndocs.pages = lambda: pathlib.Path({str(folder / 'pages')!r})\n"
            f"docs.build(pathlib.Path({str(folder / 'site')!r}))")
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert made.returncode == 0 and not made.stdout and not made.stderr, made.stdout + made.stderr
    return folder / "site"


def test_links_and_nothing_from_the_network(docs, site):
    assert docs.check(site) == []
    for path in site.rglob("*.html"):
        assert not re.search(r"<(?:script|iframe)[^>]*src=[\"']?(?:https?:)?//|<style[^>]*>[^<]*@import|fonts\.(?:googleapis|gstatic)", path.read_text(encoding="utf-8")), path


def test_the_check_sees(docs, tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">x</a><a href="#here">x</a><img '
                                     'src="https://example.org/a.png"><script '
                                     'src="//example.org/a.js"></script><p id="there">')
    (tmp_path / "a.css").write_text("@font-face { src: url('https://example.org/a.woff2') }")
    assert len(docs.check(tmp_path)) == 5


def test_every_notebook_is_a_page(site):
    for path in (root / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts: continue
        page = (site / path.relative_to(root / "nbs")).with_suffix(".html")
        text = page.read_text(encoding="utf-8")
        assert "default_exp" not in re.sub(r"<code.*?</code>", "", text, flags=re.DOTALL), page
        prose = re.sub(r"<(code|pre|script|math)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert "$$" not in prose and not re.search(r"formula\d{4}x|\\(?:frac|text|sum|mathbb)\b",
                                                   prose), f"{page.name}: a formula was not shown"
        assert "merror" not in text, f"{page.name}: a formula was not understood"


def test_start_guide_settings_and_names(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    picture = re.search(r'<img[^>]*src="([^"]+)"', start)[1]
    assert (site / picture).is_file() and "bits per byte" in start
    guide = (site / "guides/transformer.html").read_text(encoding="utf-8")
    assert guide.count("<math") > 10 and "<mfrac>" in guide and "honest-limits" in guide
    settings, names = ((site / f"{name}.html").read_text(encoding="utf-8")
                       for name in ("settings", "names"))
    from sprout_lab.configs import ALIASES, sections, settings_fields
    from sprout_lab.families import families
    for cls in [*sections.values(), *(family.config_class for family in families.values())]:
        for spec in settings_fields(cls): assert f"<code>{spec.name}</code>" in settings, spec.name
    for alias in ALIASES: assert f"<code>{alias}</code>" in names, alias


def test_the_api_names_everything_public(site):
    from sprout_lab import configs, runs
    from sprout_lab.models import transformer
    from sprout_lab.trainers import trainer
    page = (site / "api.html").read_text(encoding="utf-8")
    for module in (configs, runs, trainer, transformer):
        assert f"sprout_lab.{module.__name__.removeprefix('sprout_lab.')}" in page
        for name in module.__all__:
            if callable(getattr(module, name)): assert f"<code>{name}</code>" in page, name


def test_search_finds(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    pages = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert {"index.html", "api.html", "guides/transformer.html", "models/transformer.html"} <= pages
    assert any("shaded by its surprise" in entry["text"] for entry in index["docs"])
    assert not re.search(r"formula\d{4}x", json.dumps(index))


def test_prose(docs):
    "What Jupyter and the site's generator understand differently."
    formulas = {}
    page = docs.Page(Path("models/x.md"), root / "nbs/models", formulas)
    made = page.prose("The width $d_h$ costs 3 $ or `$x$`:\n- one\n- two "
                      "[Runs](../runs.ipynb#what-can-go-wrong) and "
                      "[data](transformer.ipynb)\n```\n$y$\n```\n[![badge](https://example.org/b.svg)](https://example.org)")
    assert len(formulas) == 1 and "`$x$`" in made and "$y$" in made and ":\n\n- one\n- two" in made
    assert "(../runs.md#what-can-go-wrong)" in made and "(transformer.md)" in made and "[badge](https://example.org)" in made
    with pytest.raises(SystemExit, match="leads nowhere"): page.prose("[x](nothing.ipynb)")
