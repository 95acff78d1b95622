"""The documentation as a site in site/, offline: every notebook a page, formulas as MathML, the API as tables, search. `make docs` builds and checks it.

Notebooks are turned into Markdown here: prose as it is, code without directives, outputs as text, tables and picture files. Nothing of the site comes from another machine."""
import ast
import base64
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

from readme import address, render, root

rooms = {"": "Start", "models": "Models", "data": "Data", "trainers": "Trainers",
         "evaluation": "Evaluation", "decoding": "Decoding", "kernels": "Kernels",
         "visualizers": "Visualizers", "panels": "Panels", "guides": "Guides"}
STYLE = """
.md-grid { max-width: 76rem; }
.md-typeset math { font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", "DejaVu Math TeX Gyre", math, serif; }
.md-typeset math[display="block"] { margin: .6em 0; padding: .4em 0; font-size: 1.1em; overflow: auto hidden; }
.md-typeset pre > code { font-size: .66rem; }
.md-typeset .output { margin: -.4em 0 1.4em; padding: 0 .8em; border-left: .15rem solid var(--md-default-fg-color--lightest); overflow-x: auto; }
.md-typeset .output pre { margin: 0; font-size: .68rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
.md-typeset .output pre > code { background: none; padding: .2em 0; }
.md-typeset .output img { display: block; background: white; }
.md-typeset .output table { font-size: .64rem; border-collapse: collapse; }
.md-typeset .output th, .md-typeset .output td { padding: .15em .8em .15em 0; }
.md-typeset code.signature { display: block; margin-top: .35em; font-size: .58rem; line-height: 1.5; background: none; padding: 0; opacity: .75; overflow-wrap: anywhere; }
.md-typeset td code { word-break: normal; overflow-wrap: normal; }
.md-typeset table:not([class]) td:first-child code { white-space: nowrap; }
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
    script.onload = () => { const waiting = this.waiting; this.waiting = null; waiting.forEach(data => this.postMessage(data)) };
    frame.contentDocument.body.append(script);
  }
  postMessage(data) { this.waiting ? this.waiting.push(data) : this.inside.dispatchEvent(new MessageEvent("message", {data})) }
  terminate() {}
};
"""


# ---- notebooks → Markdown

class Page:
    """One page on its way to Markdown: `formulas` are kept aside by a token each, `place` is the
    source's folder, `target` the page's place below the pages."""

    def __init__(self, target: Path, place: Path, formulas: dict[str, str]):
        self.target, self.place, self.formulas, self.pictures = target, place, formulas, 0

    def prose(self, text: str) -> str:
        """Markdown as Jupyter understands it → as the site's generator does: formulas, links, lists
        that follow a line of text."""
        code = r"(^```.*?^```[^\n]*$|``.+?``|`[^`\n]+`)"
        parts = re.split(code, text, flags=re.DOTALL | re.MULTILINE)
        for i in range(0, len(parts), 2):
            part = re.sub(r"\$\$(.+?)\$\$", lambda m: self.formula(m[1], "block"), parts[i],
                          flags=re.DOTALL)
            part = re.sub(r"(?<![\\$\w])\$(?!\s)((?:[^$\n]|\n(?!\n))+?)(?<!\s)\$(?!\w)",
                          lambda m: self.formula(m[1], "inline"), part)
            # a picture of another machine's: its words
            part = re.sub(r"!\[([^\]]*)\]\(\w+://[^)]*\)", r"\1", part)
            parts[i] = part
        text = re.sub(code + r"|\]\(([^)\s]+)\)", lambda m: m[1] or f"]({self.link(m[2])})",
                      "".join(parts), flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r'(src|href)="([^"]+)"', lambda m: f'{m[1]}="{self.link(m[2])}"', text)
        return re.sub(r"^(?!\s*(?:[-*+]|\d+\.) |\s*$|\s)(.+)\n(?=(?:[-*+]|\d+\.) )", r"\1\n\n",
                      text, flags=re.MULTILINE)

    def formula(self, tex: str, display: str) -> str:
        from latex2mathml.converter import convert
        token = f"formula{len(self.formulas):04d}x"
        self.formulas[token] = (convert(tex.strip(), display=display), tex.strip())
        return f"\n\n{token}\n\n" if display == "block" else token

    def link(self, target: str) -> str:
        """A link of a notebook as a link of its page; what is not part of the site lies in the
        repository."""
        path, _, part = target.partition("#")
        if not path or re.match(r"\w+:", path): return target
        full = (self.place / path).resolve()
        if not full.exists():
            raise SystemExit(f"{self.place.relative_to(root) / self.target.name}: the link "
                             f"{target} leads nowhere")
        inside = full.is_relative_to(root / "nbs") and full.is_file()
        if not inside:
            where = address()
            return f"https://github.com/{where['user']}/{where['repo']}/{'tree' if full.is_dir() else 'blob'}/{where['branch']}/{full.relative_to(root).as_posix()}"
        shown = Path(os.path.relpath(full.relative_to(root / "nbs"), self.target.parent)).as_posix()
        return re.sub(r"\.ipynb$", ".md", shown) + (f"#{part}" if part else "")

    def output(self, output: dict) -> str:
        "An output as HTML or fenced text; widgets, which need a kernel, are left out."
        data = {kind: "".join(value) if isinstance(value, (list, str)) else value for kind,
                value in output.get("data", {}).items()}
        if any("widget" in kind for kind in data): return ""
        if "image/png" in data:
            self.pictures += 1
            picture = self.target.with_name(f"{self.target.stem}-{self.pictures}.png")
            picture_file = pages() / picture
            picture_file.parent.mkdir(parents=True, exist_ok=True)
            picture_file.write_bytes(base64.b64decode(data["image/png"]))
            shown = f'<img src="{picture.name}" alt="a picture drawn by the cell above">'
        elif "text/html" in data: shown = re.sub(r"\n\s*\n", "\n", data["text/html"])
        elif "text/markdown" in data: return self.prose(data["text/markdown"])
        else:
            text = data.get("text/plain") or "".join(output.get("text",
                                                                "")) or "".join(output.get("evalue",
                                                                                           ""))
            if not text.strip(): return ""
            text = re.sub(r"\x1b\[[0-9;]*m", "", text)
            shown = f"<pre><code>{html.escape(text.rstrip())}</code></pre>"
        return f'<div class="output">{shown}</div>'

    def notebook(self, path: Path) -> str:
        parts = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"]).strip()
            if not source or re.search(r"^#\|\s*(hide|default_exp)\b", source, flags=re.MULTILINE):
                continue
            if cell["cell_type"] == "markdown":
                parts.append(self.prose(source))
                continue
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
            if source: parts.append(f"````python\n{source}\n````")
            streams, merged = [], []
            # what was printed piece by piece is read as one
            for output in cell.get("outputs", []):
                if output["output_type"] == "stream" and streams:
                    streams[-1]["text"] = "".join(streams[-1]["text"]) + "".join(output["text"])
                else: merged.append(dict(output))
                streams = [merged[-1]] if output["output_type"] == "stream" else []
            parts += [shown for shown in map(self.output, merged) if shown]
        return "\n\n".join(parts) + "\n"


def title_of(notebook: Path) -> str:
    "A notebook's first heading."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for line in cell["source"]:
            if line.startswith("# "): return line[2:].strip()
    return notebook.stem


# ---- the API

def signature(node) -> str:
    "`name(arguments)` of a function, or of a class by its `__init__`."
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef)
                     and n.name == "__init__"), None)
        if init is None: return node.name
        arguments = ast.unparse(init.args).split(", ", 1)
        return f"{node.name}({arguments[1] if len(arguments) > 1 else ''})"
    return f"{node.name}({ast.unparse(node.args)})"


def api_page() -> str:
    """Every public function and class of the library: signature and the first paragraph of its
    docstring."""
    parts = ["# API\n\nEvery public name, by module; the module's page shows it in use.\n"]
    for path in sorted((root / "sprout_lab").rglob("*.py")):
        if path.name.startswith("_"): continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        rows = []
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            said = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(said, quote=False))
            call = signature(node)
            shown = "" if call == node.name else f'<code class="signature">{html.escape(call, quote=False)}</code>'
            rows.append(f"<tr><td><code>{node.name}</code></td><td>{said}{shown}</td></tr>")
        if not rows: continue
        module = path.relative_to(root / "sprout_lab").with_suffix("").as_posix()
        page = f"[{module}]({module}.md): " if (root / "nbs" / f"{module}.ipynb").exists() else ""
        table = "<table><thead><tr><th>name</th><th>what it does</th></tr></thead><tbody>" + "".join(rows) + "</tbody></table>"
        parts.append("\n\n".join([f"## sprout_lab.{module.replace('/', '.')}",
                                  page + (ast.get_docstring(tree) or "").split("\n")[0], table]))
    return "\n\n".join(parts) + "\n"


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
    return f"# Other people's names\n\nOne thing has one name here. The names that other scripts use are understood, too, as flags (with dashes or underscores), in files and in notebooks.\n\n{aliases_table()}\n"


# ---- the site

def pages() -> Path: return root / "build" / "docs"


def build(site: Path) -> None:
    "Write the pages and let mkdocs make the site of them; a broken link inside it is an error."
    shutil.rmtree(pages(), ignore_errors=True)
    pages().mkdir(parents=True)
    formulas: dict[str, tuple[str, str]] = {}
    notebooks = [p for p in sorted((root / "nbs").rglob("*.ipynb"))
                 if ".ipynb_checkpoints" not in p.parts and p != root / "nbs/index.ipynb"]
    for path in notebooks:
        target = path.relative_to(root / "nbs").with_suffix(".md")
        (pages() / target).parent.mkdir(parents=True, exist_ok=True)
        (pages() / target).write_text(Page(target, path.parent, formulas).notebook(path),
                                      encoding="utf-8")
    for path in (root / "nbs").rglob("*"):   # pictures that the prose shows
        if path.suffix in (".png", ".svg", ".gif",
                           ".jpg") and ".ipynb_checkpoints" not in path.parts:
            (pages() / path.relative_to(root / "nbs")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, pages() / path.relative_to(root / "nbs"))
    (pages() / "index.md").write_text(Page(Path("index.md"), root,
                                           formulas).prose(render().split("-->\n", 1)[-1]),
                                      encoding="utf-8")
    (pages() / "api.md").write_text(api_page(), encoding="utf-8")
    (pages() / "settings.md").write_text(settings_page(), encoding="utf-8")
    (pages() / "names.md").write_text(names_page(), encoding="utf-8")
    (pages() / "style.css").write_text(STYLE, encoding="utf-8")
    nav = [{"Start": [{"sprout-lab": "index.md"}]}]
    for room, name in rooms.items():
        entries = [{title_of(n): n.relative_to(root / "nbs").with_suffix(".md").as_posix()}
                   for n in notebooks if n.parent == root / "nbs" / room]
        if room == "": nav[0]["Start"] += entries
        elif entries: nav.append({name: entries})
    nav.append({"Reference": [{"Settings": "settings.md"}, {"Other people's names": "names.md"},
                              {"API": "api.md"}]})
    where = address()
    repository = f"https://github.com/{where['user']}/{where['repo']}"
    config = {
        "site_name": "sprout-lab", "docs_dir": str(pages()), "site_dir": str(site),
        "use_directory_urls": False, "nav": nav, "extra_css": ["style.css"],
        # as a link: as `repo_url` the theme would ask GitHub for its stars
        "copyright": f'<a href="{repository}">{where["user"]}/{where["repo"]}</a>',
        "theme": {"name": "material", "font": False,
                  "features": ["navigation.sections", "navigation.top", "toc.follow",
                               "content.code.copy", "search.highlight"]},
        # offline: the search works from a folder, too, without a server
        "plugins": ["search", "offline"],
        "markdown_extensions": ["tables", "sane_lists", "pymdownx.superfences",
                                {"toc": {"permalink": True, "toc_depth": 3}},
                                {"pymdownx.highlight": {"pygments_lang_class": True}}],
    }
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from mkdocs.commands.build import build as make
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort
    logging.basicConfig(format="%(levelname)s  %(message)s", level=logging.WARNING)
    file = root / "build" / "mkdocs.yml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    try: make(load_config(str(file), strict=True))
    except Abort as error:
        raise SystemExit(f"the documentation could not be built: {error}") from None
    (site / "assets" / "frame.js").write_text(FRAME, encoding="utf-8")
    for path in [*site.rglob("*.html"), *site.rglob("search_index.js*")]:
        text = path.read_text(encoding="utf-8")
        kept = 0 if path.suffix == ".html" else 1   # the search finds a formula by its TeX
        made = re.sub(r"formula\d{4}x", lambda m: formulas[m[0]][0] if not kept
                      else json.dumps(html.escape(formulas[m[0]][1]))[1:-1], text)
        made = made.replace("https://unpkg.com/iframe-worker/shim",
                            Path(os.path.relpath(site / "assets/frame.js", path.parent)).as_posix())
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
