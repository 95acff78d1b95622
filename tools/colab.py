"""colab/<family>.ipynb for every family of the register, from one template. `--check` only says whether they are in step.

The notebooks differ by what the register says of a family (title, summary, sizes, objective, pictures, data) and by nothing else. A picture that a family
names is written once, in `PICTURES`; what is done with a trained model of an objective once, in `USES`. The address comes from settings.ini."""
import json
import sys
from dataclasses import dataclass

from readme import address, root

from sprout_lab.data.corpora import corpora
from sprout_lab.families import SIZES, families


@dataclass(frozen=True)
class Cell:
    "A cell of the template; `{{name}}` stands for a fact of the family or of the address. A form's code is folded away in Colab."
    text: str
    kind: str = "code"
    form: bool = False


def words(text: str) -> Cell: return Cell(text.strip(), "markdown")
def code(text: str) -> Cell: return Cell(text.strip())
def form(text: str) -> Cell: return Cell(text.strip(), form=True)


OPENING = [
    words("""
[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{user}}/{{repo}}/blob/{{branch}}/colab/{{name}}.ipynb)

# {{title}}: train one, look inside, let it write
> {{summary}}

*Runtime → Run all* trains a model on a GPU, shows its curve while it grows, measures it on text it has not seen, and packs the run for download. Change a setting and run
it again; run it again unchanged after an interruption and it **continues from its last checkpoint**.
"""),
    words("""
## Is there a GPU?
In Colab: *Runtime → Change runtime type → T4 GPU*. Without one a small model is trained on the CPU, in a few minutes.
"""),
    code("""
import torch

if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
else: print("no GPU: the CPU will do for the size nano")
"""),
    words("""
## Install
One line, and only in Colab, which keeps its own PyTorch. On your own machine install the same address with `pip` before you open this notebook.
"""),
    code("""
try: import google.colab
except ImportError: IN_COLAB = False
else: IN_COLAB = True

if IN_COLAB:
    %pip install -q "git+https://github.com/{{user}}/{{repo}}@{{branch}}"

import sprout_lab
print(f"sprout-lab {sprout_lab.__version__}")
"""),
    words("""
## Where runs are kept
A Colab machine forgets everything when it goes away. With the switch on, runs are kept in your Google Drive, and a later session continues them. It is off by default because
Drive asks for your permission, and *Run all* would wait there.
"""),
    form("""
#@title Keep runs in Google Drive
USE_DRIVE = False  #@param {type:"boolean"}

from pathlib import Path

RUNS = Path("runs")
if USE_DRIVE and IN_COLAB:
    from google.colab import drive
    drive.mount("/content/drive")
    RUNS = Path("/content/drive/MyDrive/sprout-lab")
print(f"runs are kept in {RUNS}")
"""),
    words("""
## Settings
Zero means: what suits the size, or what a run that is continued had. `auto` is {{gpu_size}} with a GPU and {{cpu_size}} without. A corpus is {{corpora}}, or the path of a text file that you have uploaded. Every other setting of
the family may be added to `settings` in the code (`sprout-lab train {{name}} --help` lists them).
"""),
    form("""
#@title Settings
SIZE = "auto"  #@param {{size_menu}}
CORPUS = "{{data}}"  #@param {{corpus_menu}} {allow-input: true}
STEPS = 0  #@param {type:"integer"}
BATCH_SIZE = 0  #@param {type:"integer"}
SEQUENCE_LENGTH = 0  #@param {type:"integer"}
LEARNING_RATE = 0.0  #@param {type:"number"}
MINUTES_AT_MOST = 0  #@param {type:"integer"}
SEED = 42  #@param {type:"integer"}
RUN_NAME = ""  #@param {type:"string"}

import os
from sprout_lab.families import configure

size = SIZE if SIZE != "auto" else "{{gpu_size}}" if torch.cuda.is_available() else "{{cpu_size}}"
settings = {"dataset_name": CORPUS, "max_steps": STEPS, "batch_size": BATCH_SIZE, "sequence_length": SEQUENCE_LENGTH, "learning_rate": LEARNING_RATE,
            "max_minutes": MINUTES_AT_MOST, "seed": SEED, "mixed_precision": "auto"}
settings = {name: value for name, value in settings.items() if value or name == "seed"}

# SPROUT_LAB_QUICK=1 in the environment: half a minute on a CPU, to see that every cell works
if os.environ.get("SPROUT_LAB_QUICK") == "1":
    size = "{{cpu_size}}"
    settings |= {"max_steps": 40, "warmup_steps": 5, "batch_size": 4, "sequence_length": 64, "eval_interval": 20, "eval_batches": 2,
                 "save_interval": 10, "log_interval": 5, "sample_tokens": 20, "device": "cpu", "mixed_precision": "no"{{quick}}}

RUN = RUNS / (RUN_NAME or f"{{name}}-{size}-{Path(CORPUS).stem}")
run = configure("{{name}}", {**settings, "output_dir": str(RUN), "resume_from": "auto"}, size=size)   # auto: continue what is there, or begin
print(run.command())
"""),
    words("""
## Sliders, if you like
The same settings under sliders, with buttons to run, stop and resume. It trains beside the notebook, in a run of its own; *Run all* does not wait for it.
"""),
    form("""
#@title Show the panel
SHOW_PANEL = False  #@param {type:"boolean"}

if SHOW_PANEL:
    from sprout_lab.panels import panel
    display(panel("{{name}}", preset=size, dataset_name=CORPUS))
"""),
    words("""
## Train
The curve is drawn in **bits per byte**: how many bits the model needs to say what comes next, on training text and on text it has not seen. The dashed lines are compressors on
the same text. Stop it whenever you like; running the cells again goes on from the last checkpoint.
"""),
    code("""
from sprout_lab.families import make_trainer
from sprout_lab.panels.live import Live

trainer = make_trainer(run, extra_callbacks=[Live()])
if trainer.step >= trainer.total_steps: print(f"this run is finished at step {trainer.step:,}; give more STEPS, or another RUN_NAME")
trainer.train()
print(f"{trainer.stop_reason} at step {trainer.step:,}, in {RUN}")
"""),
]

USES = {
    "causal": {
        "measure": [
            words("""
## How good is it?
The best checkpoint, on all of the text that was held out, beside what compressors make of the same text. Lower is better.
"""),
            code("""
from sprout_lab.evaluation.evaluator import Evaluator
from sprout_lab.metrics import held_out_baselines
from sprout_lab.families import load_model

model, tokenizer = load_model(RUN)   # the best checkpoint, an ordinary Hugging Face model
model.to(trainer.accelerator.device)
score = Evaluator(model, tokenizer, {"sequence_length": run.data.sequence_length}).evaluate(trainer.data.validation)
for name, bits in sorted({"this model": score["bits_per_byte"], **held_out_baselines(trainer.data)}.items(), key=lambda pair: pair[1]):
    print(f"{bits:6.3f} bits per byte   {name}")
print(f"the next token is the likeliest one in {score['accuracy']:.1%} of all cases, among the likeliest five in {score['top5_accuracy']:.1%}")
"""),
        ],
        "use": [
            words("""
## It writes
Higher temperatures are wilder. Run the cell again with another prompt or another seed.
"""),
            form("""
#@title Write
PROMPT = "{{prompt}}"  #@param {type:"string"}
TEMPERATURE = 0.8  #@param {type:"slider", min:0, max:1.5, step:0.05}
TOP_K = 50  #@param {type:"integer"}
TOKENS = 300  #@param {type:"integer"}
TEXT_SEED = 1  #@param {type:"integer"}

from sprout_lab.decoding.sampling import stream_text

print(PROMPT, end="")
for piece in stream_text(model, tokenizer, PROMPT, max_tokens=TOKENS, temperature=TEMPERATURE, top_k=TOP_K, seed=TEXT_SEED): print(piece.text, end="")
"""),
            words("""
### With sliders
The same with sliders; each character is shaded by its surprise, and a click on one shows what else the model had in mind.
"""),
            form("""
#@title Show the playground
SHOW_PLAYGROUND = False  #@param {type:"boolean"}

if SHOW_PLAYGROUND:
    from sprout_lab.panels import playground
    display(playground(str(RUN), prompt=PROMPT))
"""),
        ],
    },
    "masked": {
        "measure": [
            words("""
## How good is it?
The best checkpoint, on all of the text that was held out. It guesses hidden tokens and sees both sides of each, which is an easier question than what comes next: its loss is no bits per byte and is
compared with other masked models only. The last line hides every token of a short text alone.
"""),
            code("""
from sprout_lab.data.masking import pseudo_log_likelihood
from sprout_lab.evaluation.evaluator import Evaluator
from sprout_lab.families import load_model

model, tokenizer = load_model(RUN)   # the best checkpoint, an ordinary Hugging Face model
model.to(trainer.accelerator.device)
score = Evaluator(model, tokenizer, {"sequence_length": run.data.sequence_length}).evaluate(trainer.data.validation)
print(f"{score['loss']:.3f} nats per hidden token; the right token is the likeliest one in {score['accuracy']:.1%} of all cases, among the likeliest five in {score['top5_accuracy']:.1%}")
few = tokenizer.decode([int(i) for i in trainer.data.validation[:256]])
print(f"{pseudo_log_likelihood(model, tokenizer, few)['pseudo_bits_per_byte']:.3f} pseudo bits per byte on the first 256 tokens of it")
"""),
        ],
        "use": [
            words("""
## It fills gaps
Write `[MASK]` where a token is missing: with bytes each is one letter. Its guesses stand in brackets.
"""),
            form("""
#@title Fill
TEXT = "To be, or [MASK][MASK][MASK] to be: [MASK]hat is the question."  #@param {type:"string"}

from sprout_lab.decoding.filling import fill_masks

filled = fill_masks(model, tokenizer, TEXT)
print(filled.marked)
for likely in filled.alternatives: print("   ".join(f"{text!r} {p:.0%}" for text, p in likely))
"""),
            words("""
## Ask a text where it went
Type a sentence: the path that it takes, how well each child suited it, and what a node's attention did.
"""),
            form("""
#@title Ask
SENTENCE = "O Romeo, Romeo! wherefore art thou Romeo?"  #@param {type:"string"}

from sprout_lab.panels import ask

ask(model, tokenizer, SENTENCE)
"""),
        ],
    },
}

PICTURES = {
    "tree": [
        words("""
### The tree
Nodes are as large as they were used, edges as thick as their traffic, colours tell the depth.
"""),
        code("""
from sprout_lab.visualizers.tree import plot_tree

model.visualize_structure()
plot_tree(model.config.parents, model.tree.usage())
"""),
    ],
    "growth": [
        words("""
### How it grew
Step by step: move the slider, or press play. The same is written into the run as a page of its own and as an animated GIF.
"""),
        code("""
from sprout_lab.panels import replay

replay(RUN, html_file=RUN / "results/growth.html", gif_file=RUN / "results/growth.gif")
"""),
    ],
    "compatibility": [
        words("""
### What its routers think
For pieces of text that it has not seen (down), how well each child suits them (across); the dot is the child that was chosen. Columns that are the same in every row belong to a router that does not look.
"""),
        code("""
from sprout_lab.visualizers.tree import plot_compatibility

length = run.data.sequence_length
pieces = torch.tensor([[int(i) for i in trainer.data.validation[start:start + length]] for start in range(0, 12 * length, length)], device=model.device)
with torch.no_grad(): log = model(input_ids=pieces, log_paths=True).path_log
if len(model.tree.nodes) > 1: display(plot_compatibility(log.compatibilities(), len(pieces), model.config.parents, names=[tokenizer.decode(row.tolist()) for row in pieces]))
else: print("the tree is its root alone, and has no router yet; train it for longer")
"""),
    ],
    "destinations": [
        words("""
### Which texts go where
Three kinds of text: what it was trained on, another book, and its own text with the letters shuffled. Do they end at different nodes?
"""),
        code("""
import random
from sprout_lab.data.corpora import load_corpus
from sprout_lab.visualizers.tree import plot_destinations

shuffled = list(held_out)
random.Random(0).shuffle(shuffled)
other = next(iter(load_corpus("tales" if CORPUS == "shakespeare" else "shakespeare").documents("validation")))[:2000]
kinds, rows = [], []
for kind, text in (("held-out text", held_out), ("another book", other), ("letters shuffled", "".join(shuffled))):
    ids = tokenizer.encode(text, add_special_tokens=False)
    for start in range(0, len(ids) - 64, 64): kinds.append(kind), rows.append(ids[start:start + 64])
with torch.no_grad(): log = model(input_ids=torch.tensor(rows, device=model.device), log_paths=True).path_log
plot_destinations(log.paths().numpy(), kinds)
"""),
    ],
    "attention": [
        words("""
### What the attention looks at
One square for each head of a block: for every letter (down) how much of its attention goes to which earlier letter (across). First the lowest block, then the highest.
"""),
        code("""
from sprout_lab.visualizers.attention import plot_attention

text = held_out[:28]
ids = tokenizer.encode(text)
with torch.no_grad(): seen = model(input_ids=torch.tensor([ids], device=model.device), output_attentions=True)
for layer in (0, len(seen.attentions) - 1): display(plot_attention(seen.attentions, [tokenizer.decode([i]) for i in ids], layer=layer))
"""),
    ],
    "embeddings": [
        words("""
### Where letters live
Rows of the embedding on their two main directions. Nobody told the model what a vowel is.
"""),
        code("""
from sprout_lab.visualizers.embeddings import plot_embeddings

letters = [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?'-" if len(tokenizer.encode(c)) == 1]
kinds = ["vowel" if c in "aeiou" else "letter" if c.islower() else "capital" if c.isupper() else "punctuation" for c in letters]
rows = [tokenizer.encode(c)[0] for c in letters]
plot_embeddings(model.get_input_embeddings().weight.detach()[rows].float().cpu(), labels=letters, groups=kinds)
"""),
    ],
    "surprise": [
        words("""
### Where it is surprised
Text that it has not seen, each piece shaded by its surprise. The beginnings of words are hard, their ends are easy.
"""),
        code("""
from sprout_lab.evaluation.surprise import text_surprise
from sprout_lab.visualizers.surprise import plot_surprise

found = text_surprise(model, tokenizer, held_out[:480])
plot_surprise(found.pieces, found.nats)
"""),
    ],
    "half_lives": [
        words("""
### How long it remembers
For every channel of every recurrent block, after how many steps half of what it held is forgotten.
"""),
        code("""
from sprout_lab.models.slm import half_lives
from sprout_lab.visualizers.chunks import plot_half_lives

lives = half_lives(model, torch.tensor([tokenizer.encode(held_out[:512])], device=model.device))
plot_half_lives([channels.cpu().numpy() for channels in lives])
"""),
    ],
    "ternary_weights": [
        words("""
### What became of the weights
Some of the matrices before rounding: what lies in the middle becomes 0, the sides become -1 and 1.
"""),
        code("""
from sprout_lab.models.slm import BitLinear
from sprout_lab.visualizers.chunks import plot_ternary_weights

matrices = {name: layer.weight.detach().float().cpu().numpy() for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
plot_ternary_weights({name.removeprefix("model."): matrices[name] for name in list(matrices)[:4]}, columns=2)
"""),
    ],
    "chunks": [
        words("""
### Where it cuts
Text that it has not seen: each byte shaded by the probability of a cut before it, a bar where a chunk begins.
"""),
        code("""
from sprout_lab.visualizers.chunks import plot_boundaries

part = held_out[:480]
with torch.no_grad(): seen = model(input_ids=torch.tensor([tokenizer.encode(part)], device=model.device), use_cache=False)
plot_boundaries(part.encode(), seen.boundary_prob[0][0].float().cpu().numpy(), seen.boundary_mask[0][0].cpu().numpy())
"""),
    ],
}

LOOKING = [
    words("## Look inside"),
    code("""
held_out = tokenizer.decode([int(i) for i in trainer.data.validation[:2000]])   # the beginning of the text that it has not seen
print(held_out[:200])
"""),
]

CLOSING = [
    words("""
## Take it with you
The run as one file: its configuration, its logs, its results and its best checkpoint. Unpacked anywhere, `sprout-lab generate --model_path` takes the folder.
"""),
    form("""
#@title Download the run
DOWNLOAD = True  #@param {type:"boolean"}

import zipfile

packed = Path(f"{RUN.name}.zip")
with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
    for part in ("config.yaml", "experiment_summary.json", "logs/**/*", "results/*", "checkpoints/best/*"):
        for file in sorted(RUN.glob(part)):
            if file.is_file(): archive.write(file, Path(RUN.name, file.relative_to(RUN)))
print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MiB")
if IN_COLAB and DOWNLOAD:
    from google.colab import files
    files.download(str(packed))
"""),
    words("""
## Next
- Change one setting above, run it again under another `RUN_NAME`, and compare: `from sprout_lab.panels import compare; compare(RUNS)` shows the curves of all runs side by side.
{{links}}
"""),
]


def facts(name: str) -> dict[str, str]:
    "What the template's places stand for, for a family."
    family = families[name]
    sizes = [size for size in SIZES if size in family.presets]
    where = address()
    at = f"https://github.com/{where['user']}/{where['repo']}/blob/{where['branch']}"
    pages = [(f"nbs/guides/{name}.ipynb", "The guide"), (f"nbs/models/{name}.ipynb", "The model, built piece by piece")]
    links = [f"- {title}: [{page}]({at}/{page})" for page, title in pages if (root / page).exists()]
    prompt = {"shakespeare": "ROMEO:", "tales": "Once upon a time"}.get(family.default_data, "The ")
    return {**where, "name": name, "title": family.title, "summary": family.summary, "data": family.default_data, "prompt": prompt,
            "gpu_size": sizes[min(1, len(sizes) - 1)], "cpu_size": sizes[0], "size_menu": json.dumps(["auto", *sizes]), "corpus_menu": json.dumps(list(corpora)),
            "corpora": " or ".join(f"`{corpus}`" for corpus in corpora), "links": "\n".join(links),
            "quick": ', "growth_warmup": 8, "growth_interval": 8' if "growth_warmup" in family.config_class.settings.model_fields else ""}


def cells_of(name: str) -> list[Cell]:
    "The template's cells for a family."
    family = families[name]
    unknown = [f"PICTURES has no {p!r}" for p in family.pictures if p not in PICTURES] + ([] if family.objective in USES else [f"USES has no {family.objective!r}"])
    if unknown: sys.exit(f"tools/colab.py: {name}: {', '.join(unknown)}")
    use = USES[family.objective]
    return [*OPENING, *use["measure"], *LOOKING, *(cell for picture in family.pictures for cell in PICTURES[picture]), *use["use"], *CLOSING]


def notebook(name: str) -> str:
    "The text of colab/<name>.ipynb."
    places, cells = facts(name), []
    for number, cell in enumerate(cells_of(name)):
        text = cell.text
        for place, value in places.items(): text = text.replace("{{" + place + "}}", value)
        made = {"cell_type": cell.kind, "id": f"cell-{number:02d}", "metadata": {"cellView": "form"} if cell.form else {}, "source": text.splitlines(keepends=True)}
        cells.append({**made, "execution_count": None, "outputs": []} if cell.kind == "code" else made)
    metadata = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": [], "toc_visible": True},
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def out_of_step() -> list[str]:
    "The notebooks in colab/ that are not what this file says: missing, different, or of no family."
    made = {f"{name}.ipynb": notebook(name) for name in families}
    there = {path.name: path.read_text(encoding="utf-8") for path in (root / "colab").glob("*.ipynb")}
    return sorted(name for name in {*made, *there} if made.get(name) != there.get(name))


if __name__ == "__main__":
    if "--check" in sys.argv:
        if wrong := out_of_step(): sys.exit(f"not what tools/colab.py says (run it): {', '.join('colab/' + name for name in wrong)}")
    else:
        (root / "colab").mkdir(exist_ok=True)
        for name in families: (root / "colab" / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
        for path in (root / "colab").glob("*.ipynb"):
            if path.stem not in families: path.unlink()
