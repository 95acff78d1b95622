# Everything works on a fresh machine that has Python 3.10 or newer: the first target makes .venv from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := runs/demo

.PHONY: demo test slow lab app docs bench records gpu export

demo: $(READY)  ## train, let it write, then compare all families (under five minutes on two cores)
	@$(BIN)/sprout-lab train transformer --preset demo --output_dir $(RUN) --resume_from auto
	@echo; echo "what it writes:"; echo
	@$(BIN)/sprout-lab generate --model_path $(RUN) --prompt "ROMEO:" --max_tokens 240 --temperature 0.8 --seed 1
	@echo; echo "the curve: $(RUN)/results/bits_per_byte.png    the run: sprout-lab runs show demo"
	@echo; echo "and now every family under one budget:"; echo
	@$(BIN)/sprout-lab compare --amount 3e10 --seeds 1 --rates 1 --no_beside --evaluations 5 \
	  --final_eval_batches 8 --output_dir runs/demo-comparison

test: $(READY)  ## everything that CI runs
	@$(BIN)/python tools/check.py

slow: $(READY)  ## the checks that take minutes or a GPU
	@$(BIN)/python -m pytest --slow --cuda

lab: $(READY)  ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=nbs

app: $(READY)  ## the lab as a page, on this machine alone: http://127.0.0.1:8866
	@$(BIN)/voila nbs/lab.ipynb --Voila.ip=127.0.0.1 --no-browser --show_tracebacks=True

docs: $(READY)  ## the documentation as a site, in site/
	@$(BIN)/python tools/docs.py

bench: $(READY)  ## ratios against named peers (NANOGPT=path of a clone)
	@OMP_NUM_THREADS=1 $(BIN)/sprout-lab bench transformer $(if $(NANOGPT),--peer nanogpt=$(NANOGPT))

records: $(READY)  ## every comparison below runs/ beside the recorded one of its plan: fails where one is worse
	@$(BIN)/sprout-lab records $(shell find runs -path '*/results.json' -not -path '*/results/*' 2>/dev/null)

gpu:  ## all that needs a GPU, with the machine's own Python (DEVICE=cpu QUICK=1: at toy size)
	@$(PYTHON) tools/gpu.py $(if $(DEVICE),--device $(DEVICE)) $(if $(QUICK),--quick) \
	  $(if $(NANOGPT),--peer nanogpt=$(NANOGPT)) $(if $(ENWIK8),--enwik8 $(ENWIK8)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PARTS),--only $(PARTS)) \
	  $(if $(PACKAGES),--packages $(PACKAGES))

export: $(READY)  ## notebooks → library, cleaned notebooks, README
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(BIN)/python tools/readme.py && $(BIN)/python tools/colab.py

# torch first and from the constraints: a range alone would bring gigabytes of CUDA packages
$(READY): constraints.txt settings.ini setup.py pyproject.toml
	@echo "setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)
