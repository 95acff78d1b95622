"""Part 4: decoding one text and sixty-four through the engine, beside transformers' generate and
beside the same step in a CUDA graph, capture included."""
import torch
from sprout_lab.configs import ConfigError
from sprout_lab.decoding.cuda_graphs import FixedStep
from sprout_lab.decoding.engine import Engine
from sprout_lab.evaluation.benchmarks import compare, decode_greedily
from sprout_lab.families import families

from .report import Report, Settings, race

PROMPT = list(b"To be, or not to be")


def decode_in_a_graph(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    "The likeliest continuation of each prompt, `new` tokens long, by a step of fixed shape."
    state = engine.prefill(prompts)
    written = [state.logits.argmax(-1)]
    step = FixedStep(engine, state, room=new)
    for _ in range(new - 1): written.append(step(written[-1]).argmax(-1))
    return torch.stack(written, 1).tolist()


def captured_side(count: int, device: str) -> str:
    "The name of a side; without a GPU the step of fixed shape runs as it is."
    return f"{count} in a CUDA graph" if device == "cuda" else f"{count} at fixed shapes"


def graph_sides(report: Report, engine: Engine, counts, new: int, name: str) -> dict:
    "A side for each number of texts, where the family's step can be captured."
    sides = {}
    for count in counts:
        side = captured_side(count, engine.model.device.type)
        try: decode_in_a_graph(engine, [PROMPT] * count, 2)
        except ConfigError as error: report.absent(f"{name}, {side}", str(error))
        else: sides[side] = lambda n=count: decode_in_a_graph(engine, [PROMPT] * n, new)
    return sides


def measure_family(report: Report, settings: Settings, family) -> None:
    size, new, many = ("nano", 8, 4) if settings.quick else ("small", 256, 64)
    torch.manual_seed(0)
    model = family.build(size, objective="causal").eval().to(settings.device)
    engine = Engine(model)
    ids = torch.tensor([PROMPT], device=settings.device)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    def generate(count: int):
        prompts = ids.repeat(count, 1)
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    sides = {}
    for count in (1, many):
        sides[f"{count} in the engine"] = lambda n=count: decode_greedily(
            engine, [PROMPT] * n, new)
        sides[f"{count} in generate"] = lambda n=count: generate(n)
    sides |= graph_sides(report, engine, (1, many), new, family.name)
    with torch.inference_mode(): seconds = race(report, sides, settings, rounds=3)
    for count, target in ((1, ">= 1.25"), (many, None)):
        what = f"{family.name} {size}, {count} text{'s' if count > 1 else ''}, {new} tokens"
        engine_side, generate_side = f"{count} in the engine", f"{count} in generate"
        if not seconds.get(engine_side): continue
        report.add(compare("decoding", what, seconds, engine_side, generate_side,
                           amount=count * new, unit="tokens/s", target=target))
        fixed_side = captured_side(count, settings.device)
        if seconds.get(fixed_side):
            report.add(compare("decoding", f"{what}, fixed", seconds, fixed_side, engine_side,
                               amount=count * new, unit="tokens/s"))
    one, all_of_them = "1 in the engine", f"{many} in the engine"
    if seconds.get(all_of_them):
        report.add(compare("decoding", f"{family.name} {size}, cost of a step", seconds,
                           all_of_them, one, amount=new, cost=True))


def run(report: Report, settings: Settings) -> None:
    for family in families.values():
        if "causal" not in family.objectives: continue
        with report.attempt(family.name): measure_family(report, settings, family)
