"""colab/<family>.ipynb for every family of the register, from tools/colab_template.ipynb, and
colab/compare.ipynb from tools/colab_compare_template.ipynb. `--check` only says whether they are in
step.

A cell of the template stands in every notebook, unless a tag says otherwise: `objective:NAME` for
families of that objective, `picture:NAME` for families that
have that picture, `each-picture` once for each of a family's pictures. `{{name}}` stands for a fact
of the family, of the picture, or of the address in
settings.ini."""
import json
import re
import sys
import textwrap

from readme import address, root

from sprout_lab.configs import settings_fields
from sprout_lab.data.corpora import corpora
from sprout_lab.data.questions import series_sets
from sprout_lab.families import SIZES, families
from sprout_lab.objectives import FillsGaps, get_objective

TEMPLATE = root / "tools" / "colab_template.ipynb"
COMPARE = root / "tools" / "colab_compare_template.ipynb"


NOTEBOOKS = (*families, "compare")


def own_settings(family) -> dict[str, str]:
    """The family's own settings of the register as lines of Colab's form: those that are a number
    or a choice."""
    specs = {spec.name: spec for spec in settings_fields(family.config_class)}
    form = {}
    for name in family.top_settings:
        spec = specs[name]
        if spec.choices:
            form[name] = f'"auto"  #@param {json.dumps(["auto", *spec.choices])}'
        elif spec.type is int: form[name] = '0  #@param {type:"integer"}'
        elif spec.type is float: form[name] = '0.0  #@param {type:"number"}'
    return {name: f"{name.upper()} = {line}" for name, line in form.items()}


def words_of(family) -> dict[str, str]:
    "What is said of a family by what its models learn."
    objective, own = get_objective(family.objective), own_settings(family)
    writes = objective.continues_text
    fills = isinstance(objective, FillsGaps)
    verb = "let it write" if writes else "let it fill gaps" if fills else "ask it questions"
    command = "draw" if fills else "generate --model_path"
    compressors = " The dashed lines are\ncompressors on the same text." if writes else ""
    pairs = "".join(f',\n            "{name}": {name.upper()}' for name in own)
    listed = ", ".join(f"`{name.upper()}`" for name in own)
    return {"verb": verb, "unit": f"**{objective.unit}**", "baselines": compressors,
            "takes": f"`sprout-lab {command}`",
            "own_form": "".join(f"{line}\n" for line in own.values()), "own_settings": pairs,
            "own_words": f" The family's own:\n{listed}." if own else ""}


def colab_links() -> dict[str, str]:
    "Each family's notebook as a link that opens it in Colab."
    where = address()
    colab = "https://colab.research.google.com/github/"
    colab += f"{where['user']}/{where['repo']}/blob/{where['branch']}/colab"
    return {name: f"[{family.title}]({colab}/{name}.ipynb)" for name, family in families.items()}


def comparison_facts() -> dict[str, str]:
    "What the places stand for in the notebook that compares all families."
    sizes = [size for size in SIZES if all(size in f.presets for f in families.values())]
    return {**address(), "name": "compare", "size_menu": json.dumps(sizes),
            "corpus_menu": json.dumps(list(corpora)), "families": ", ".join(families),
            "corpora": ", ".join(f"`{corpus}`" for corpus in corpora),
            "links": f"- One family alone: {', '.join(colab_links().values())}"}


def facts(name: str) -> dict[str, str]:
    "What the template's places stand for, for a family."
    family, where = families[name], address()
    sizes = [size for size in SIZES if size in family.presets]
    at = f"https://github.com/{where['user']}/{where['repo']}/blob/{where['branch']}"
    pages = [(f"nbs/guides/{name}.ipynb", "The guide"),
             (f"nbs/models/{name}.ipynb", "The model, built piece by piece")]
    links = [f"- {title}: [{page}]({at}/{page})" for page, title in pages if (root / page).exists()]
    reads_text = family.default_data in corpora
    sets = list(corpora if reads_text else series_sets)
    listed = ", ".join(f"`{corpus}`" for corpus in sets)
    own_file = ", or the path of a text file that you have uploaded" if reads_text else ""
    others = [link for key, link in colab_links().items() if key != name]
    links.append(f"- The same with another family: {', '.join(others)}")
    grows = "growth_warmup" in family.config_class.settings.model_fields
    return {
        **where, **words_of(family), "name": name, "title": family.title, "summary": family.summary,
        "data": family.default_data,
        "prompt": {"shakespeare": "ROMEO:", "tales": "Once upon a time"}.get(family.default_data,
                                                                             "The "),
        "gpu_size": sizes[min(1, len(sizes) - 1)], "cpu_size": sizes[0],
        "size_menu": json.dumps(["auto", *sizes]), "corpus_menu": json.dumps(sets),
        "data_words": f"A corpus is {listed}{own_file}.", "links": "\n".join(links),
        "quick": ',\n                 "growth_warmup": 8, "growth_interval": 8' if grows else ""}


def picture_facts(name: str, function) -> dict[str, str]:
    "The places of a picture: its title and words are the first line of its docstring."
    title, _, words = function.__doc__.strip().split("\n")[0].partition(": ")
    return {"picture": name, "picture_title": title, "picture_words": words[:1].upper() + words[1:]}


def cells_of(family) -> list[tuple[dict, dict]]:
    "The template's cells that a family's notebook has, each with the facts of its picture."
    chosen, pictures = [], []
    for cell in json.loads(TEMPLATE.read_text(encoding="utf-8"))["cells"]:
        kind, _, value = next(iter(cell["metadata"].get("tags", [""]))).partition(":")
        if kind == "each-picture": pictures.append(cell); continue
        if pictures:
            chosen += [(part, picture_facts(*named)) for named in family.pictures.items()
                       for part in pictures]
            pictures = []
        if kind == "objective" and value != family.objective: continue
        if kind == "picture" and value not in family.pictures: continue
        chosen.append((cell, {}))
    return chosen


def wrapped(text: str, width: int = 100) -> str:
    """Markdown whose paragraphs, made longer by what was put in, are broken at `width`; headings,
    lists, quotations and pictures stay."""
    made, paragraph = [], []
    for line in [*text.split("\n"), ""]:
        if line and line[0] not in "#>-![| ": paragraph.append(line); continue
        if max(map(len, paragraph), default=0) > width:
            # what stands in code is not broken
            whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(paragraph))
            broken = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
            paragraph = [part.replace("\0", " ") for part in broken]
        made += [*paragraph, line]
        paragraph = []
    return "\n".join(made[:-1])


def notebook(name: str) -> str:
    "The text of colab/<name>.ipynb."
    if name == "compare":
        plain = [(cell, {}) for cell in json.loads(COMPARE.read_text(encoding="utf-8"))["cells"]]
        return filled(comparison_facts(), plain)
    return filled(facts(name), cells_of(families[name]))


def filled(places: dict[str, str], chosen: list[tuple[dict, dict]]) -> str:
    "A notebook of cells with what their places stand for."
    cells = []
    for number, (cell, more) in enumerate(chosen):
        text = "".join(cell["source"])
        for place, value in {**places, **more}.items():
            text = text.replace("{{" + place + "}}", value)
        if cell["cell_type"] == "markdown": text = wrapped(text)
        metadata = {key: value for key, value in cell["metadata"].items() if key != "tags"}
        cells.append({**cell, "id": f"cell-{number:02d}", "metadata": metadata,
                      "source": text.splitlines(keepends=True)})
    whole = {**json.loads(TEMPLATE.read_text(encoding="utf-8")), "cells": cells}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def out_of_step() -> list[str]:
    """The notebooks in colab/ that are not what the template says: missing, different, or of no
    family."""
    made = {f"{name}.ipynb": notebook(name) for name in NOTEBOOKS}
    there = {path.name: path.read_text(encoding="utf-8")
             for path in (root / "colab").glob("*.ipynb")}
    return sorted(name for name in {*made, *there} if made.get(name) != there.get(name))


if __name__ == "__main__":
    if "--check" in sys.argv:
        names = ", ".join(f"colab/{name}" for name in out_of_step())
        if names: sys.exit(f"not what the template says (run tools/colab.py): {names}")
    else:
        (root / "colab").mkdir(exist_ok=True)
        for name in NOTEBOOKS:
            (root / "colab" / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
        for path in (root / "colab").glob("*.ipynb"):
            if path.stem not in NOTEBOOKS: path.unlink()
