"""The documentation as a site in site/, offline: every notebook a page, the settings and the API as tables, with search."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from readme import address, render, root

pages = root / "build" / "docs"
rooms = {"": "Start", "models": "Models", "data": "Data", "trainers": "Trainers", "evaluation": "Evaluation", "decoding": "Decoding", "kernels": "Kernels",
         "visualizers": "Visualizers", "panels": "Panels", "guides": "Guides"}


def title_of(notebook: Path) -> str:
    "A notebook's first heading."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for line in cell["source"]:
            if line.startswith("# "): return line[2:].strip()
    return notebook.stem


def signature(node) -> str:
    "`name(arguments)` of a function, or of a class by its `__init__`."
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None: return node.name
        arguments = ast.unparse(init.args).split(", ", 1)
        return f"{node.name}({arguments[1] if len(arguments) > 1 else ''})"
    return f"{node.name}({ast.unparse(node.args)})"


def api_page() -> str:
    "Every public function and class of the library: signature and the first paragraph of its docstring."
    parts = ["# API\n\nEvery public name, by module; the module's page shows it in use.\n"]
    for path in sorted((root / "sprout_lab").rglob("*.py")):
        if path.name.startswith("_"): continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        rows = []
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
            said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).replace("|", "\\|")
            rows.append(f"| `{signature(node).replace('|', chr(92) + '|')}` | {said} |")
        if rows:
            name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
            parts.append("\n".join([f"## {name}", "", (ast.get_docstring(tree) or "").split("\n")[0], "", "| name | what it does |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def build() -> None:
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(root / "nbs", pages, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "index.ipynb", "runs"))
    (pages / "index.md").write_text(render().replace("](nbs/", "]("), encoding="utf-8")
    (pages / "api.md").write_text(api_page(), encoding="utf-8")
    nav = [{"Start": [{"sprout-lab": "index.md"}]}]
    for room, name in rooms.items():
        notebooks = sorted((pages / room).glob("*.ipynb"))
        entries = [{title_of(n): n.relative_to(pages).as_posix()} for n in notebooks]
        if room == "": nav[0]["Start"] += entries
        elif entries: nav.append({name: entries})
    nav.append({"API": "api.md"})
    where = address()
    config = {
        "site_name": "sprout-lab", "docs_dir": str(pages), "site_dir": str(root / "site"), "repo_url": f"https://github.com/{where['user']}/{where['repo']}", "edit_uri": "",
        "use_directory_urls": False, "nav": nav,
        "theme": {"name": "material", "font": False, "features": ["navigation.sections", "navigation.top", "toc.follow"]},
        "plugins": ["search", {"mkdocs-jupyter": {"execute": False, "include_source": True, "ignore_h1_titles": True}}],
        "markdown_extensions": ["tables", "fenced_code", {"toc": {"permalink": True}}],
    }
    file = root / "build" / "mkdocs.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    code = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "-f", str(file)], cwd=root).returncode
    if code: sys.exit("the documentation could not be built")
    print(f"documentation: {root / 'site' / 'index.html'}")


if __name__ == "__main__": build()
