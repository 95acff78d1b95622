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
        loads = (r"<(?:script|iframe)[^>]*src=[\"']?(?:https?:)?//|<style[^>]*>[^<]*@import"
                 r"|fonts\.(?:googleapis|gstatic)")
        assert not re.search(loads, path.read_text(encoding="utf-8")), path


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
        assert "$$" not in prose and not re.search(r"\\(?:frac|text|sum|mathbb)\b",
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
        assert module.__name__ in page
        for name in module.__all__:
            defined = getattr(module, name)
            if isinstance(defined, type) or hasattr(defined, "__code__"):
                assert f"#{module.__name__}.{name}" in page, name


def test_a_module_page_has_signatures_docstrings_and_examples(site):
    page = (site / "kernels/scan.html").read_text(encoding="utf-8")
    assert 'id="sprout_lab.kernels.scan.gated_scan"' in page and "Source code in" in page
    assert "the notebook" in page and "open in Colab" in (site / "guides/slm.html").read_text()


def test_formulas_have_no_tex_left(site):
    for path in site.rglob("*.html"):
        for formula in re.findall(r"<math.*?</math>", path.read_text(encoding="utf-8"),
                                  flags=re.DOTALL):
            words = re.sub(r"<[^>]*>", "",
                           re.sub(r"<annotation.*?</annotation>", "", formula, flags=re.DOTALL))
            assert "\\" not in words, f"{path.name}: {words[:80]}"


def test_a_formula_is_set_by_the_signs_of_its_widest_line(docs, site):
    "So that it is whole on a narrow page: the page divides its width by that number."
    assert docs.signs(r"h_t = f_t \odot h_{t-1}") == 10
    assert docs.signs(r"\frac{\partial L}{\partial i_t} = \delta_t") == len("xit") + len("=xt")
    assert docs.signs(r"\text{clamp}(x)\quad\cos y") == len("clamp(x)xxcosy")
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        blocks = len(re.findall(r'<math[^>]*display="block"', text))
        assert blocks == len(re.findall(r'<div class="formula" style="--signs: \d+">', text)), path


def test_it_has_a_dark_form_a_way_on_and_a_logo(site):
    page = (site / "guides/slm.html").read_text(encoding="utf-8")
    assert ('data-md-color-scheme="slate"' in page and "md-footer__link--next" in page
            and "logo.svg" in page)


def test_search_for_install_leads_to_the_start(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    found = [entry["location"].split("#")[0] for entry in index["docs"]
             if "install" in (entry["title"] + entry["text"]).lower()]
    assert "index.html" in found


def test_the_workflow_builds_and_publishes_it():
    import yaml
    workflow = yaml.safe_load((root / ".github/workflows/docs.yml").read_text())
    steps = workflow["jobs"]["build"]["steps"]
    assert {"run": "make docs"} in steps and workflow["jobs"]["publish"]["needs"] == "build"
    assert any(step.get("with", {}).get("path") == "site" for step in steps)


def test_search_finds(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    pages = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert {"index.html", "api.html", "guides/transformer.html", "models/transformer.html"} <= pages
    assert any("shaded by its surprise" in entry["text"] for entry in index["docs"])


def test_prose(docs):
    "What Jupyter and the site's generator understand differently."
    made = docs.prose("The width `$x$`:\n- one\n- two [Runs](../runs.ipynb#what-can-go-wrong) and "
                      "[data](transformer.ipynb)\n```\n[y](z)\n```\n"
                      "[![badge](https://example.org/b.svg)](https://example.org)",
                      root / "nbs/models")
    assert "`$x$`" in made and "[y](z)" in made and ":\n\n- one\n- two" in made
    assert "(../runs.md#what-can-go-wrong)" in made and "(transformer.md)" in made
    assert "[badge](https://example.org)" in made
    with pytest.raises(SystemExit, match="leads nowhere"):
        docs.prose("[x](nothing.ipynb)", root / "nbs/models")
