"""What a guide costs: each one (or those named) is run from top to bottom in a kernel of its own,
with one thread, and the processor time that the kernel and its children used is noted in
nbs/guides/times.csv, from which the README's table is made.

Processor time, not the clock's: it is nearly the same on an idle machine and on a busy one, where
the clock would measure the neighbours. The start of the kernel is in it, a download is not.

    python tools/guide_times.py            # all, an hour and less
    python tools/guide_times.py sprout slm
"""
import csv
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

GUIDES = Path(__file__).resolve().parent.parent / "nbs/guides"
TIMES = GUIDES / "times.csv"
ASK = "import os; t = os.times(); print(t.user + t.system + t.children_user + t.children_system)"


def measure(path: Path) -> float:
    "Seconds of processor time that a notebook's run took; an error in a cell is an error here."
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=folder).execute()
    return float(notebook.cells[-1].outputs[0].text)


def read_times() -> dict[str, dict]:
    "The noted rows by guide: `cpu_seconds` and the `date` of the measurement."
    if not TIMES.exists(): return {}
    with open(TIMES, encoding="utf-8", newline="") as file:
        return {row["guide"]: row for row in csv.DictReader(file)}


def note(guide: str, seconds: float) -> None:
    "Write a guide's row; the rows of guides that are gone go, too."
    today = datetime.now(timezone.utc).date().isoformat()
    rows = {**read_times(), guide: {"guide": guide, "cpu_seconds": f"{seconds:.0f}", "date": today}}
    with open(TIMES, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["guide", "cpu_seconds", "date"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for name, row in sorted(rows.items())
                         if (GUIDES / f"{name}.ipynb").exists())


if __name__ == "__main__":
    known = sorted(path.stem for path in GUIDES.glob("*.ipynb"))
    wanted = sys.argv[1:] or known
    for name in wanted:
        if name not in known: sys.exit(f"{name}: no such guide; there are {', '.join(known)}")
    # before a kernel imports torch
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        filter(None, [str(GUIDES.parent.parent), os.environ.get("PYTHONPATH")]))}
    os.environ.pop("CI", None)   # live progress is part of it
    for name in wanted:
        seconds = measure(GUIDES / f"{name}.ipynb")
        note(name, seconds)
        print(f"{name}: {seconds:.0f} s of processor time", flush=True)
