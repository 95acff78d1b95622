"""The documentation as a site in site/, offline: guides first, a page for every notebook, the API
from the docstrings, formulas as MathML, search.

nbconvert makes Markdown of the notebooks, mkdocstrings reads the library's signatures and
docstrings, mkdocs with the material theme makes the site. Here is
what is ours: which cells are shown and how, where links lead, and a check that nothing is broken
and nothing is loaded from the network."""
import ast
import html
import json
import logging
import os
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor
from readme import GUIDE_ORDER, address, render, root
from traitlets.config import Config

ROOMS = {"guides": "Guides", "models": "Models", "data": "Data", "trainers": "Training",
         "evaluation": "Evaluation", "decoding": "Decoding", "serving": "Serving",
         "panels": "Panels", "laboratory": "Laboratory", "visualizers": "Pictures",
         "kernels": "Kernels", "": "The house"}
FIRST = ("start", *GUIDE_ORDER)
STYLE = """
.md-grid { max-width: 76rem; }
.md-typeset math { font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math",
                             "DejaVu Math TeX Gyre", math, serif; }
.md-typeset .formula { container-type: inline-size; }
/* as large as there is room for all of its signs, and whole on a telephone, too */
.md-typeset math[display="block"] { margin: .6em 0; padding: .4em 0;
                                    font-size: clamp(.45em, 100cqi / (.8 * var(--signs)), 1.1em);
                                    overflow: auto hidden; max-width: 100%; }
.md-typeset pre > code { font-size: .66rem; }
.md-typeset .output { margin: -.4em 0 1.4em; padding: 0 .8em; overflow-x: auto;
                       border-left: .15rem solid var(--md-default-fg-color--lightest); }
.md-typeset .output pre { margin: 0; font-size: .68rem; line-height: 1.45;
                           white-space: pre-wrap; overflow-wrap: anywhere; }
.md-typeset .output img, .md-typeset p > img { background: white; max-width: 100%; }
.md-typeset .page-links { font-size: .62rem; opacity: .8; margin: 0 0 1em; }
.md-typeset .doc-heading { font-size: .8rem; }
.md-typeset table:not([class]) td:nth-child(-n+2) code { white-space: nowrap; }
"""

# A page opened from a folder may not start a worker: its script runs in a hidden frame instead,
# where the theme would have fetched a script that does this.
FRAME = """
if (location.protocol === "file:") window.Worker = window.IFrameWorker = class extends EventTarget {
  constructor(url) {
    super();
    this.waiting = [];
    const frame = document.createElement("iframe"), script = document.createElement("script");
    frame.hidden = true;
    document.documentElement.append(frame);
    this.inside = frame.contentWindow;
    this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
    script.src = url;
    script.onload = () => {
      const waiting = this.waiting;
      this.waiting = null;
      waiting.forEach(data => this.postMessage(data));
    };
    frame.contentDocument.body.append(script);
  }
  postMessage(data) {
    if (this.waiting) this.waiting.push(data);
    else this.inside.dispatchEvent(new MessageEvent("message", {data}));
  }
  terminate() {}
};
"""




# ---- notebooks → Markdown

def module_of(path: Path) -> str:
    "The dotted name of the module that a notebook exports, or nothing."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]),
                          flags=re.MULTILINE)
        if found: return f"sprout_lab.{found[1]}"
    return ""


def public_names(source: str) -> list[str]:
    "The public functions and classes that a cell defines."
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds)
            and not node.name.startswith("_")]


class Shown(Preprocessor):
    """What a reader sees of a notebook: hidden cells are gone; an exported definition is its
    signature and docstring, read from the library, with the source a click
    away; a demonstration is code with its output; what needs a kernel (widgets) is left out."""

    def preprocess(self, notebook, resources):
        module, cells = resources["module"], []
        for cell in notebook.cells:
            if re.search(r"^#\|\s*(hide|default_exp)\b", cell.source,
                         flags=re.MULTILINE) or not cell.source.strip():
                continue
            exported = cell.cell_type == "code" and re.match(r"#\|\s*export", cell.source)
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source,
                                 flags=re.MULTILINE).strip() if cell.cell_type == "code" else cell.source
            if exported and module:
                names = [f"::: {module}.{name}" for name in public_names(cell.source)]
                if not names: continue
                cell.cell_type, cell.source = "markdown", "\n\n".join(names)
            elif cell.cell_type == "markdown": cell.source = prose(cell.source, resources["place"])
            else:
                pages = [plain(output) for output in merged(cell.outputs)]
                cell.outputs = [page for page in pages if page]
            cells.append(cell)
        notebook.cells = cells
        return notebook, resources


def merged(outputs: list) -> list:
    "Outputs with what was printed piece by piece as one."
    joined = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else: joined.append(output)
    return joined


def plain(output):
    """An output that a page can show, or none: no widgets, no colours of a terminal; HTML keeps no
    blank lines, which would end it."""
    data = output.get("data", {})
    if any("widget" in kind for kind in data): return None
    if "text" in output: output.text = re.sub(r"\x1b\[[0-9;]*m", "", output.text)
    if "text/html" in data:
        dense = re.sub(r"\n\s*\n", "\n", data["text/html"])
        data["text/html"] = f'<div class="output">{dense}</div>'
    return output


def prose(text: str, place: Path) -> str:
    """Markdown of a notebook as the site's: links to pages, a blank line before a list that follows
    a line of text. Code stays as it is."""
    code = r"(^```.*?^```[^\n]*$|``.+?``|`[^`\n]+`)"
    parts = re.split(code, text, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):
        # a picture of another machine's: its words
        part = re.sub(r"!\[([^\]]*)\]\(\w+://[^)]*\)", r"\1", parts[i])
        part = re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({page_link(m[1], place)})", part)
        part = re.sub(r'(src|href)="([^"]+)"', lambda m: f'{m[1]}="{page_link(m[2], place)}"', part)
        parts[i] = part
    text = "".join(parts)
    return re.sub(r"^(?!\s*(?:[-*+]|\d+\.) |\s*$|\s)(.+)\n(?=(?:[-*+]|\d+\.) )", r"\1\n\n", text,
                  flags=re.MULTILINE)


def page_link(target: str, place: Path) -> str:
    """A link of a notebook in `place` as a link of its page; what is not part of the site lies in
    the repository."""
    path, _, part = target.partition("#")
    if not path or re.match(r"\w+:", path): return target
    full = (place / path).resolve()
    if not full.exists():
        raise SystemExit(f"{place.relative_to(root)}: the link {target} leads nowhere")
    if not (full.is_relative_to(root / "nbs") and full.is_file()):
        kind, inside = "tree" if full.is_dir() else "blob", full.relative_to(root).as_posix()
        return f"{repository()}/{kind}/{address()['branch']}/{inside}"
    home = place if place.is_relative_to(root / "nbs") else root / "nbs"
    shown = Path(os.path.relpath(full, home)).as_posix()
    return re.sub(r"\.ipynb$", ".md", shown) + (f"#{part}" if part else "")


def repository() -> str: return f"https://github.com/{address()['user']}/{address()['repo']}"


def write_page(path: Path) -> None:
    "The Markdown of a notebook, and its pictures beside it."
    target = pages() / path.relative_to(root / "nbs").with_suffix(".md")
    target.parent.mkdir(parents=True, exist_ok=True)
    exporter = MarkdownExporter(config=Config({"MarkdownExporter": {"preprocessors": [Shown]}}))
    resources = {"module": module_of(path), "place": path.parent,
                 "output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    text, made = exporter.from_filename(str(path), resources)
    for name, content in made["outputs"].items():
        (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (target.parent / name).write_bytes(content)
    target.write_text(with_links(text, path), encoding="utf-8")


def with_links(text: str, path: Path) -> str:
    "A page with its source, and where it has one its Colab notebook, under its title."
    inside, colab = path.relative_to(root).as_posix(), root / "colab" / path.name
    links = [f"[the notebook]({repository()}/blob/{address()['branch']}/{inside})"]
    if path.parent.name == "guides" and colab.exists():
        where = f"{address()['user']}/{address()['repo']}/blob/{address()['branch']}/colab/{path.name}"
        links.append(f"[open in Colab](https://colab.research.google.com/github/{where})")
    return re.sub(r"^(# .+\n)", lambda m: f'{m[1]}\n<p class="page-links" '
                                          f'markdown>{" · ".join(links)}</p>\n', text, count=1,
                  flags=re.MULTILINE)


def title_of(notebook: Path) -> str:
    "A notebook's first heading."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for line in cell["source"]:
            if line.startswith("# "): return line[2:].strip()
    return notebook.stem


# ---- pages that are no notebook

def api_page(notebooks: list[Path]) -> str:
    "Every public name by module, each a link to where it stands with its docstring."
    parts = ["# API\n\nEvery public name, by module; each leads to its signature, docstring and "
             "example.\n"]
    for path in notebooks:
        module = module_of(path)
        if not module: continue
        page = path.relative_to(root / "nbs").with_suffix(".md").as_posix()
        file = root / Path(*module.split(".")).with_suffix(".py")
        names = public_names(file.read_text(encoding="utf-8")) if file.exists() else []
        links = ", ".join(f"[`{name}`]({page}#{module}.{name})" for name in names)
        if links: parts.append(f"## [{module}]({page})\n\n{links}\n")
    return "\n".join(parts)


def settings_page() -> str:
    "Every setting of a run, and of each family's model, as tables from their definitions."
    from sprout_lab.configs import sections, settings_table
    from sprout_lab.families import families
    parts = ["# Settings\n\nEvery setting of a run is a flag of `sprout-lab train`, a key of a "
             "configuration file, and a control of a panel. The defaults are those without a preset; "
             "`sprout-lab train FAMILY --dry-run` shows what a preset makes of them.\n"]
    tables = [(name.capitalize(), cls) for name,
              cls in sections.items()] + [(f"Model: {family.title}", family.config_class)
                                          for family in families.values()]
    for title, cls in tables:
        said = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        parts.append(f"## {title}\n\n{said}\n\n{settings_table(cls)}\n")
    return "\n".join(parts)


def names_page() -> str:
    "The spellings of other scripts that are understood."
    from sprout_lab.configs import aliases_table
    return (f"# Other people's names\n\nOne thing has one name here. The names that other scripts "
            f"use are understood, too, as flags (with dashes or underscores), in files and in "
            f"notebooks.\n\n{aliases_table()}\n")



# ---- the site

def pages() -> Path: return root / "build" / "docs"


def order(path: Path) -> tuple:
    "Guides in their own order, everything else by title."
    known = path.stem in FIRST
    return (0 if known else 1, FIRST.index(path.stem) if known else 0, title_of(path))


def navigation(notebooks: list[Path]) -> list[dict]:
    "Start, then the guides, then the rooms."
    nav: list[dict] = [{"Start": "index.md"}]
    for room, name in ROOMS.items():
        there = sorted((n for n in notebooks if n.parent == root / "nbs" / room), key=order)
        if room == "guides": there = [n for n in notebooks if n == root / "nbs/start.ipynb"] + there
        if room == "": there = [n for n in there if n.stem != "start"]
        entries = [{title_of(n): n.relative_to(root / "nbs").with_suffix(".md").as_posix()}
                   for n in there]
        if entries: nav.append({name: entries})
    return [*nav, {"Reference": [{"Settings": "settings.md"}, {"Other people's names": "names.md"},
                                 {"API": "api.md"}]}]


def configuration(site: Path, notebooks: list[Path]) -> dict:
    "mkdocs' settings."
    palette = [{"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "green",
                "toggle": {"icon": "material/weather-night", "name": "dark"}},
               {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "green",
                "toggle": {"icon": "material/weather-sunny", "name": "light"}}]
    features = ["navigation.sections", "navigation.top", "navigation.footer", "toc.follow",
                "content.code.copy", "search.highlight"]
    options = {"show_root_heading": True, "show_root_full_path": False, "heading_level": 4,
               "show_source": True, "docstring_style": None,
               "show_signature_annotations": True, "separate_signature": True, "line_length": 88,
               "members": False, "show_bases": False}
    return {
        "site_name": "sprout-lab", "docs_dir": str(pages()), "site_dir": str(site),
        "use_directory_urls": False,
        "nav": navigation(notebooks), "extra_css": ["style.css"],
        # as a link: as `repo_url` the theme would ask GitHub for its stars
        "copyright": f'<a href="{repository()}">{address()["user"]}/{address()["repo"]}</a>',
        "theme": {"name": "material", "font": False, "palette": palette, "features": features,
                  **({"logo": "images/logo.svg", "favicon": "images/logo.svg"}
                     if (root / "nbs/images/logo.svg").exists() else {})},
        # offline: the search works from a folder, too, without a server
        "plugins": ["search", "offline",
                    {"mkdocstrings": {"handlers": {"python": {"paths": [str(root)],
                                                              "options": options}}}}],
        "markdown_extensions": ["tables", "sane_lists", "md_in_html", "admonition",
                                "pymdownx.details", "pymdownx.superfences",
                                {"pymdownx.arithmatex": {"generic": True}},
                                {"toc": {"permalink": True, "toc_depth": 3}},
                                {"pymdownx.highlight": {"pygments_lang_class": True}}]}


def build(site: Path) -> None:
    "Write the pages and let mkdocs make the site of them; a broken link inside it is an error."
    shutil.rmtree(pages(), ignore_errors=True)
    pages().mkdir(parents=True)
    notebooks = [p for p in sorted((root / "nbs").rglob("*.ipynb"))
                 if ".ipynb_checkpoints" not in p.parts and p != root / "nbs/index.ipynb"]
    for path in notebooks: write_page(path)
    for path in (root / "nbs").rglob("*"):   # pictures that the prose shows
        if path.suffix not in (".png", ".svg", ".gif",
                               ".jpg") or ".ipynb_checkpoints" in path.parts:
            continue
        (pages() / path.relative_to(root / "nbs")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, pages() / path.relative_to(root / "nbs"))
    written = {"index.md": prose(render().split("-->\n", 1)[-1], root),
               "api.md": api_page(notebooks), "settings.md": settings_page(),
               "names.md": names_page(), "style.css": STYLE}
    for name, text in written.items(): (pages() / name).write_text(text, encoding="utf-8")
    file = root / "build" / "mkdocs.yml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(configuration(site, notebooks), sort_keys=False),
                    encoding="utf-8")
    make(file)
    finish(site)


def make(file: Path) -> None:
    "Run mkdocs; its warnings are errors."
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from mkdocs.commands.build import build as run_mkdocs
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort
    logging.basicConfig(format="%(levelname)s  %(message)s", level=logging.WARNING)
    try: run_mkdocs(load_config(str(file), strict=True))
    except Abort as error:
        raise SystemExit(f"the documentation could not be built: {error}") from None


def signs(tex: str) -> int:
    "About how many signs a line of TeX shows beside each other; of a fraction, its longer side."
    longer = lambda fraction: max(fraction[1], fraction[2], key=len)
    tex = re.sub(r"\\q?quad|&", "xx", re.sub(r"\\(?:left|right|,|;|!)", "", tex))
    tex = re.sub(r"\\(?:text|mathrm|mathbf|operatorname|bar|hat|tilde)\b", "", tex)
    tex = re.sub(r"\\[a-zA-Z]*frac\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}",
                 longer, tex)
    return len(re.sub(r"[{}_^\s]", "", re.sub(r"\\[a-zA-Z]+|\\.", "x", tex)))


def finish(site: Path) -> None:
    "Formulas as MathML, and the search's helper from this site instead of the network."
    (site / "assets" / "frame.js").write_text(FRAME, encoding="utf-8")
    formula = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>',
                         flags=re.DOTALL)
    def mathml(found):
        tex = html.unescape(found[2]).strip()
        for name in ("max", "min"):
            tex = tex.replace(rf"\arg\{name}", rf"\operatorname{{arg{name}}}")
        if found[1] == "span": return convert(tex, display="inline")
        widest = max(map(signs, tex.split(r"\\")))
        made = convert(tex, display="block")
        return f'<div class="formula" style="--signs: {widest}">{made}</div>'
    for path in [*site.rglob("*.html"), *site.rglob("search_index.js*")]:
        text = path.read_text(encoding="utf-8")
        made = formula.sub(mathml, text) if path.suffix == ".html" else text
        helper = Path(os.path.relpath(site / "assets/frame.js", path.parent)).as_posix()
        made = made.replace("https://unpkg.com/iframe-worker/shim", helper)
        if made != text: path.write_text(made, encoding="utf-8")


class _Links(HTMLParser):
    "A page's links, what it loads, and the places in it."

    def __init__(self):
        super().__init__()
        self.links, self.loaded, self.places = [], [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"): self.links.append(values["href"])
        if values.get("src"): self.loaded.append(values["src"])
        if tag == "link" and values.get("href") and values.get("rel") not in ("canonical", "next",
                                                                              "prev"):
            self.loaded.append(values["href"])


def check(site: Path) -> list[str]:
    """What is wrong with the site: a link into nothing, something that would be loaded from the
    network."""
    wrong, seen = [], {}
    for path in sorted(site.rglob("*.html")):
        seen[path.resolve()] = parser = _Links()
        parser.feed(path.read_text(encoding="utf-8"))
    for path, parser in seen.items():
        name = path.relative_to(site.resolve())
        if name.name == "404.html": continue   # its links are those of the server's root
        wrong += [f"{name}: loads {address}"
                  for address in parser.loaded if re.match(r"(?:https?:)?//", address)]
        for link in [*parser.links, *parser.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target / "index.html"
            if not target.exists(): wrong.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in seen and unquote(parts.fragment) not in seen[target].places:
                wrong.append(f"{name}: {link} names no place there")
    for path in site.rglob("*.css"):
        wrong += [f"{path.relative_to(site)}: loads {address}"
                  for address in re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)",
                                            path.read_text(encoding="utf-8"))]
    return wrong


if __name__ == "__main__":
    site = root / "site"
    build(site)
    if wrong := check(site): sys.exit("the documentation has mistakes:\n" + "\n".join(wrong))
    print(f"documentation: {site / 'index.html'}")
