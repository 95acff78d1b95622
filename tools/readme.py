"""README.md from nbs/index.ipynb: hidden cells dropped, text outputs as code, `{families}` as the
table of the register, `{guides}` as that of the guides with their times. `--check` only says whether they are in step."""
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# the order of the guides; others follow
GUIDE_ORDER = ("transformer", "slm", "hnet", "sprout", "mot", "tslm", "compare", "serve",
               "many_gpus", "add_a_family")


def address() -> dict:
    "The repository's public address, from settings.ini alone."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return {key: config["DEFAULT"][key] for key in ("user", "repo", "branch")}


def families_table() -> str:
    """The families of the register as a table, each with its picture, guide, room and Colab
    notebook, as far as they are there."""
    from sprout_lab.families import families
    at = "https://colab.research.google.com"
    badge = f"[![Colab]({at}/assets/colab-badge.svg)]({at}/github/{{user}}/{{repo}}/blob/{{branch}}"
    site = "https://{user}.github.io/{repo}/guides"
    rows = ["| | family | guide | how it is built | docs | Colab |", "|---|---|---|---|---|---|"]
    for name, family in families.items():
        pictures = [f"images/{name}{kind}" for kind in (".gif", ".png")]
        shown = next((p for p in pictures if (root / "nbs" / p).exists()), None)
        picture = f'<img src="{shown}" width="200" alt="{family.title}">' if shown else ""
        pages = {"guide": f"guides/{name}.ipynb", "model": f"models/{name}.ipynb"}
        guide, model = (f"[{word}]({page})" if (root / "nbs" / page).exists() else ""
                        for word, page in pages.items())
        colab = f"{badge}/colab/{name}.ipynb)" if (root / f"colab/{name}.ipynb").exists() else ""
        docs = f"[docs]({site}/{name}.html)" if guide else ""
        cells = [picture, f"**{family.title}**: {family.summary}", guide, model, docs, colab]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def guides_table() -> str:
    "The guides, each with its subtitle and the processor time that its last measured run took."
    from guide_times import GUIDES, read_times
    times, rows = read_times(), ["| guide | | processor time |", "|---|---|--:|"]
    place = {name: number for number, name in enumerate(GUIDE_ORDER)}
    there = sorted(GUIDES.glob("*.ipynb"), key=lambda p: (place.get(p.stem, len(place)), p.stem))
    for path in there:
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        title = next(line for line in first if line.startswith("# "))[2:].strip()
        said = "".join(first).partition("\n> ")[2].partition("\n\n")[0].replace("\n> ", " ")
        seconds = times.get(path.stem, {}).get("cpu_seconds")
        took = f"{int(seconds) // 60} min {int(seconds) % 60:02d} s" if seconds else "not measured"
        words = " ".join(said.split())
        rows.append(f"| [{title}](guides/{path.name}) | {words} | {took} |")
    return "\n".join(rows)


def render() -> str:
    cells = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if not source or "#| hide" in source: continue
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", [])
            markdown = output.get("data", {}).get("text/markdown")
            if markdown: parts.append("".join(markdown).strip())
            elif text: parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    text = "\n\n".join(parts) + "\n"
    for place, table in (("{families}", families_table), ("{guides}", guides_table)):
        if place in text: text = text.replace(place, table())
    for key, value in address().items(): text = text.replace("{" + key + "}", value)
    first = "<!-- written by tools/readme.py from nbs/index.ipynb; edit that -->\n"
    # the notebook's own links are seen from nbs/, those of the README from the root
    text = re.sub(r"\]\((?=(?:images|guides|models)/|start\.ipynb)", "](nbs/", text)
    return first + text.replace('src="images/', 'src="nbs/images/')


if __name__ == "__main__":
    target, text = root / "README.md", render()
    if "--check" in sys.argv:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            sys.exit("README.md is not what nbs/index.ipynb says; run `make export`")
    else: target.write_text(text, encoding="utf-8")
