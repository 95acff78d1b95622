"""Can a page be read? Counts what a reader meets: widths of lines, lengths of cells, and public
names that are shown in use. `make test` runs it.

Lines: none above 120 columns, at least 95 % at most 100, in notebooks' code, library, tests, tools
and studies. Cells that define something: none above 80 lines,
95 % at most 40. Names: at least 90 % of the public ones are used in code under their own
definition, in the notebook that defines them."""
import ast
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
WIDEST, WIDE, LONGEST, LONG, SHARE, USED = 120, 100, 80, 40, 0.95, 0.90
# nbdev's own list of names; a form of Colab
GENERATED = re.compile(r"^\s*('[\w]+',? ?)+\]?$|^__all__ = |.*#@param")


def notebooks() -> list[Path]:
    found = [*(root / "nbs").rglob("*.ipynb"), *(root / "colab").glob("*.ipynb")]
    return sorted(p for p in found if ".ipynb_checkpoints" not in p.parts)


def scripts() -> list[Path]:
    folders = [root / name for name in ("sprout_lab", "tests", "tools", "studies")]
    return sorted(p for folder in folders for p in folder.rglob("*.py") if p.name != "_modidx.py")


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def lines_of(path: Path) -> list[str]:
    whole = ("\n".join(code_cells(path)) if path.suffix == ".ipynb"
             else path.read_text(encoding="utf-8"))
    lines = whole.split("\n")
    # nbdev makes it of the notebook's own first words
    if (root / "sprout_lab") in path.parents: lines = lines[1:]
    return [line for line in lines if not GENERATED.match(line)]


def defines(cell: str) -> list[str]:
    "Public names that an exported cell defines, functions and classes."
    if not re.match(r"#\s*\|\s*export", cell): return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(cell).body if isinstance(node, kinds)
            and not node.name.startswith("_")]


def unused_names(path: Path) -> tuple[list[str], int]:
    "(public names that no later, not exported cell of the notebook uses; how many there are)."
    cells, missing, total = code_cells(path), [], 0
    for number, cell in enumerate(cells):
        shown = "\n".join(c for c in cells[number + 1:] if not re.match(r"#\s*\|\s*export", c))
        for name in defines(cell):
            total += 1
            if not re.search(rf"\b{name}\b", shown): missing.append(f"{path.stem}.{name}")
    return missing, total


def measure() -> list[str]:
    "Prints the measures; returns what falls short of them."
    wrong, lines, cells, missing, names = [], [], [], [], 0
    for path in [*notebooks(), *scripts()]:
        own = lines_of(path)
        lines += own
        wrong += [f"{path.relative_to(root)}: a line of {len(line)} columns: "
                  f"{line.strip()[:60]}" for line in own if len(line) > WIDEST]
    for path in notebooks():
        # but for its directive
        long = [len(cell.split("\n")) - 1 for cell in code_cells(path) if defines(cell)]
        cells += long
        wrong += [f"{path.relative_to(root)}: a cell of {n} lines" for n in long if n > LONGEST]
        if (root / "nbs") in path.parents:
            unused, total = unused_names(path)
            missing, names = missing + unused, names + total
    narrow, short = sum(len(line) <= WIDE
                        for line in lines) / len(lines), sum(n <= LONG for n in cells) / len(cells)
    used = 1 - len(missing) / max(1, names)
    print(f"{len(lines):,} lines: {narrow:.1%} at most {WIDE} columns, the widest "
          f"{max(map(len, lines))}")
    print(f"{len(cells):,} cells that define: {short:.1%} at most {LONG} lines, the longest "
          f"{max(cells)}")
    print(f"{names:,} public names: {used:.1%} are used under their definition")
    if narrow < SHARE:
        wrong.append(f"only {narrow:.1%} of the lines have at most {WIDE} columns; {SHARE:.0%} "
                     f"are asked for")
    if short < SHARE:
        wrong.append(f"only {short:.1%} of the cells have at most {LONG} lines; {SHARE:.0%} are "
                     f"asked for")
    if used < USED:
        wrong.append(f"only {used:.1%} of the public names are used under their definition: "
                     f"{', '.join(missing[:20])} …")
    return wrong


if __name__ == "__main__":
    if wrong := measure(): sys.exit("\n".join([*wrong[:30], f"{len(wrong)} in all"]))
