"""Checkpoints whose sums are right and whose contents are not: one line each, never a traceback, a
wait or a crash."""
import copy
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprout_lab.configs import ConfigError
from sprout_lab.runs import MANIFEST, _seal

SMALL = {"sequence_length": 32, "batch_size": 2, "max_steps": 4, "eval_interval": 4,
         "eval_batches": 1,
         "save_interval": 4, "log_interval": 2, "warmup_steps": 2, "tensorboard": False,
         "sample_tokens": 0, "final_eval_batches": 0, "device": "cpu", "num_attention_heads": 2}
SHAPES = {"transformer": {"hidden_size": 16, "num_hidden_layers": 1},
          "slm": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
          "hnet": {"d_model": [16, 16], "num_blocks": [[1, 0, 1], [1]], "num_attention_heads": 1},
          "sprout": {"hidden_size": 16, "growth_warmup": 1, "growth_interval": 1, "max_nodes": 3}}
TIME_LIMIT = 60.0   # seconds; a case takes well under one when the machine is idle

DEEP = "\0deep"   # replaced by five thousand brackets when written
STRANGE = (None, "x", "", -1, 0, 1.5, 1e300, 10**30, True, [], {}, [1, "x"], {"a": 1}, "../..",
           DEEP)


def quiet(*words): pass


def small_run(family: str, folder: Path, **flags) -> Path:
    from sprout_lab.families import configure, make_trainer
    settings = {**SMALL, **SHAPES[family], "output_dir": str(folder), **flags}
    return make_trainer(configure(family, settings, log=quiet), log=quiet).train().folder


def use(run: Path, family: str) -> None:
    "All that people do with a run's folder: load its model, let it work, look at its facts, go on."
    from sprout_lab.families import configure, load_model, make_trainer
    from sprout_lab.objectives import objective_of
    from sprout_lab.runs import checkpoint_facts, run_facts

    def load():
        model, tokenizer = load_model(run / "checkpoints" / "step_4", log=quiet)
        model(input_ids=torch.ones(1, 8, dtype=torch.long))
        if tokenizer is not None: tokenizer.decode(tokenizer.encode("To be"))
        objective_of(model)

    def go_on():
        flags = {**SMALL, **SHAPES[family], "max_steps": 5, "output_dir": str(run)}
        settings = configure(family, {**flags, "resume_from": "auto"}, log=quiet)
        make_trainer(settings, log=quiet).train()

    for act in (load, lambda: checkpoint_facts(run / "checkpoints" / "step_4"),
                lambda: run_facts(run), go_on):
        try: act()
        except ConfigError as error: assert "\n" not in str(error)


def outcome(run: Path, family: str) -> str | None:
    "What is wrong with `use` of a run, tried in a forked process; None when nothing is."
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        try: use(run, family)
        except BaseException as error:
            import traceback
            last = traceback.extract_tb(error.__traceback__)[-1]
            os.write(write,
                     f"{type(error).__name__} at {last.filename}:{last.lineno}: {error}"[:900].encode())
        os._exit(0)
    os.close(write)
    ended, _, _ = select.select([read], [], [], TIME_LIMIT)
    if not ended: os.kill(child, signal.SIGKILL)
    said = os.read(read, 1000).decode() if ended else "hangs"
    os.close(read)
    _, status = os.waitpid(child, 0)
    if not said and status: return f"dies with status {status}"
    return said or None


def forge(whole: Path, run: Path, name: str, change) -> bool:
    "Copy a run and let `change` spoil one file of its checkpoint; its sums are made right again."
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run, symlinks=True)
    checkpoint = run / "checkpoints" / "step_4"
    change(checkpoint / name)
    (checkpoint / MANIFEST).unlink()
    _seal(checkpoint)


def with_value(path: Path, keys: tuple, value) -> None:
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]: inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content).replace(json.dumps(DEEP), "[" * 5000 + "]" * 5000))


def keys_of(content, depth: int = 2) -> list[tuple]:
    "Paths to the values of a mapping, `depth` levels down."
    paths = []
    for key, value in content.items() if isinstance(content, dict) else ():
        paths.append((key,))
        if depth > 1: paths += [(key, *inner) for inner in keys_of(value, depth - 1)]
    return paths


def transposed(tensor): return tensor.transpose(0, -1).contiguous() if tensor.ndim else tensor


TENSOR_CHANGES = {
    "missing": None, "scalar": lambda tensor: torch.tensor(1.0), "empty": lambda tensor: torch.zeros(0),
    "transposed": transposed, "integers": lambda tensor: torch.ones_like(tensor, dtype=torch.long),
    "not finite": lambda tensor: torch.full_like(tensor, torch.nan),
    "negative": lambda tensor: torch.full_like(tensor, -1)}


def with_tensor(path: Path, name: str, change) -> None:
    tensors = load_file(path)
    old = tensors.pop(name)
    if change is not None: tensors[name] = change(old)
    save_file(tensors, path)


def forgeries(whole: Path):
    "(what it is, file, change) for every case of a run."
    checkpoint = whole / "checkpoints" / "step_4"
    for path in sorted(checkpoint.glob("*.json")):
        if path.name == MANIFEST: continue
        for content in ("", "{}", "[]", "null", "[" * 100_000, "\ud800", '{"a": NaN}', "1" * 5000):
            raw = content.encode("utf-8", "surrogatepass")
            yield f"{path.name} is {content[:9]!r}", path.name, lambda p, r=raw: p.write_bytes(r)
        for keys in keys_of(json.loads(path.read_text())):
            for value in STRANGE:
                said = f"{path.name}: {'.'.join(keys)} = {value!r:.20}"
                yield said, path.name, lambda p, k=keys, v=value: with_value(p, k, copy.deepcopy(v))
    for path in sorted(checkpoint.glob("*.safetensors")):
        names = sorted(load_file(path))
        for name in names[:: max(1, len(names) // 4)]:
            for what, change in TENSOR_CHANGES.items():
                yield f"{path.name}: {name} {what}", path.name, lambda p, n=name, c=change: with_tensor(p, n, c)
    extra = {"config.json": {"attn_implementation": "someone/kernel",
                             "auto_map": {"AutoConfig": "a--b.C"},
                             "_attn_implementation": "hub/kernel:thing",
                             "quantization_config": {"x": 1},
                             "vocab_size": 2**24, "hidden_size": 2**14, "num_hidden_layers": 10**4,
                             "d_model": [2**14, 2**14], "architectures": ["os.system"],
                             "dtype": "float8"},
             "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a--b.C", None]},
                                       "tokenizer_class": "Nobody",
                                       "chat_template": "{% for x in range(10**12) %}{% endfor %}"}}
    for name, settings in extra.items():
        for key, value in settings.items():
            yield f"{name}: {key} = {value!r:.30}", name, lambda p, k=key, v=value: with_value(p,
                                                                                               (k,),
                                                                                               v)


LISTED = ["trainer_state.json: step = 'x'", "trainer_state.json: last_evaluation = '\\x00deep'",
          "trainer_state.json: batches = [1, 'x']",
          "config.json: attn_implementation = 'someone/kernel'",
          "tokenizer_config.json is ''", "tokenizer_config.json is '{}'"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_run("transformer", tmp_path_factory.mktemp("whole") / "run")


def of_the_optimizer(said: str) -> bool: return said.startswith("optimizer.safetensors")


def test_the_listed_forgeries_are_one_line(whole, tmp_path):
    cases = [case for case in forgeries(whole) if case[0] in LISTED or of_the_optimizer(case[0])]
    assert len(cases) >= len(LISTED) + 8
    problems = []
    for said, name, change in cases:
        forge(whole, tmp_path / "run", name, change)
        if problem := outcome(tmp_path / "run", "transformer"):
            problems.append(f"{said} → {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_no_forgery_is_more_than_a_line(family, tmp_path):
    whole, problems, count, began = small_run(family, tmp_path / "whole"), [], 0, time.monotonic()
    for said, name, change in forgeries(whole):
        forge(whole, tmp_path / "run", name, change)
        count += 1
        if problem := outcome(tmp_path / "run", family): problems.append(f"{said} → {problem}")
    print(f"{family}: {count} forgeries in {time.monotonic() - began:.0f} s, {len(problems)} not "
          f"in one line")
    assert not problems, "\n".join(problems)
