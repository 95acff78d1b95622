"""README.md from nbs/index.ipynb: hidden cells dropped, text outputs as code. `--check` only says
whether they are in step."""
import json
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def address() -> dict:
    "The repository's public address, from settings.ini alone."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return {key: config["DEFAULT"][key] for key in ("user", "repo", "branch")}


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
    for key, value in address().items(): text = text.replace("{" + key + "}", value)
    return "<!-- written by tools/readme.py from nbs/index.ipynb; edit that -->\n" + text.replace("](images/", "](nbs/images/")


if __name__ == "__main__":
    target, text = root / "README.md", render()
    if "--check" in sys.argv:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            sys.exit("README.md is not what nbs/index.ipynb says; run `make export`")
    else: target.write_text(text, encoding="utf-8")
