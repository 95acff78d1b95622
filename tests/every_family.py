"""Trains, resumes, generates, evaluates and exports every family through the command line, and prints a line of
JSON: the versions it ran with, and what each family did. Needs nothing but the lab's own requirements: it runs in
environments that have no pytest."""
import contextlib
import io
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TINY = ["--batch_size", "2", "--sequence_length", "48", "--eval_interval", "2", "--eval_batches",
        "1",
        "--save_interval", "2", "--log_interval", "1", "--warmup_steps", "1", "--sample_tokens",
        "0",
        "--final_eval_batches", "2", "--device", "cpu"]
SHOWN = ("torch", "transformers", "accelerate", "numpy", "safetensors", "tokenizers", "datasets",
         "click")


def run(*words: str) -> str:
    "What a command of the command line prints; an error where it fails."
    from sprout_lab.cli import main
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try: status = main(list(words))
        except SystemExit as ended: status = ended.code
    if not status: return printed.getvalue()
    raise RuntimeError(f"sprout-lab {' '.join(words)}: {status}: {printed.getvalue()[-800:]}")


def exercised(name: str, folder: Path) -> dict:
    "One family: five commands, and what can be seen of each."
    from sprout_lab.families import get_family, load_model
    from sprout_lab.runs import Run
    prompt = "ROMEO: [MASK]" if get_family(name).objective == "masked" else "ROMEO:"
    path, exported = folder / name, folder / f"{name}-exported"
    run("train", name, "--size", "nano", "--max_steps", "2", *TINY, "--output_dir", str(path))
    run("train", name, "--size", "nano", "--max_steps", "4", *TINY, "--output_dir", str(path),
        "--resume_from", "auto")
    assert sorted(Run(path).steps())[-1] == 4, Run(path).steps()
    written = run("generate", "--model_path", str(path), "--prompt", prompt, "--max_tokens", "8")
    evaluated = run("evaluate", "--model_path", str(path), "--max_batches", "1")
    run("export", str(path), "--output", str(exported))
    load_model(exported, log=lambda line: None)
    return {"generated": len(written), "evaluated": evaluated.strip().splitlines()[-1][-60:]}


def main() -> None:
    from sprout_lab.families import families
    done, failed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPROUT_LAB_CACHE"] = folder
        for name in families:
            try: done[name] = exercised(name, Path(folder))
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error)[-1500:]}"
    versions = {name: version(name) for name in SHOWN}
    print(json.dumps({"python": sys.version.split()[0], **versions, "done": done,
                      "failed": failed}))


if __name__ == "__main__": main()
