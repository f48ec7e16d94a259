# Every target needs only Python 3.11+ and make; the first one run creates .venv.
PYTHON ?= python3
BIN := .venv/bin
TL2 := 4.3.0
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONWARNINGS=ignore TQDM_DISABLE=1 MPLBACKEND=agg PLOTLY_RENDERER=plotly_mimetype+notebook_connected
# run a command; its output is shown only when it fails
quiet = @log=$$($(1) 2>&1) || { printf '%s\n' "$$log"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help venv demo lab test check nbs docs leg2 pytest bench bench-gpu peers tutorials clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

venv: .venv/.ok ## create .venv from requirements.lock

.venv/.ok: requirements.lock setup.py settings.ini
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed; %s is %d.%d. Name another: make venv PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: 3 GB, a few minutes" >&2
	$(call quiet,$(BIN)/python -m pip install torch==$$(sed -n 's/^torch==//p' requirements.lock))
	$(call quiet,$(BIN)/python -m pip install -r requirements.lock)
	$(call quiet,$(BIN)/python -m pip install --no-deps --no-build-isolation -e .)
	@touch $@

demo: venv ## the main job on gemma-3-270m in eight languages, to runs/demo/report.html
	@$(BIN)/langneuron demo --out runs/demo

lab: venv ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

test: venv ## everything CI runs: check, nbs, docs, leg2, pytest
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory nbs
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory leg2
	@$(MAKE) --no-print-directory pytest

check: venv ## are modules, notebooks and README in sync, and does nothing point out of the tree?
	@echo "== modules, notebooks and README in sync"
	@$(OFFLINE) $(BIN)/python tools/in_sync.py
	@$(BIN)/python tools/strays.py

nbs: venv ## run every notebook that needs no download
	@echo "== notebooks"
	@$(OFFLINE) $(BIN)/nbdev_test --n_workers 2 --timing

pytest: venv ## the test suite on the locked TransformerLens
	@echo "== tests"
	@$(OFFLINE) $(BIN)/python -m pytest tests -q -n 2 --dist loadgroup

# core, text and figures stand above the floor that knows TransformerLens (tests/test_map.py), so its version is nothing to them; find, show,
# studies and training meet it only through models, recording, change, measure and share, which are tested
ABOVE := $(addprefix --ignore=tests/,core text figures find show studies test_map.py test_wheel.py $(addprefix tuning/test_,\
  finetune_data.py neuron_lora.py rows.py training.py tuned.py tuning_memory.py test_time.py quantised_tuning.py))
leg2: venv .tl43/.ok ## the fast tests of the floors that know TransformerLens, on another version of it
	@echo "== tests on TransformerLens $(TL2)"
	@$(OFFLINE) PYTHONPATH=.tl43 EXPECT_TL=$(TL2) $(BIN)/python -m pytest tests $(ABOVE) -q -n 2 --dist loadgroup -m "not slow"

.tl43/.ok: requirements.lock
	@rm -rf .tl43
	$(call quiet,$(BIN)/python -m pip install --target .tl43 --no-deps transformer-lens==$(TL2))
	@touch $@

docs: venv ## build the site into _docs and check its links
	@echo "== docs"
	@$(OFFLINE) $(BIN)/python tools/docs.py

bench: venv ## speed and memory beside peers, to benchmarks/results.json
	@$(BIN)/python benchmarks/bench.py
	@$(BIN)/python benchmarks/ray_bench.py
	@$(BIN)/python benchmarks/experts.py

bench-gpu: venv ## the recorder on one GPU with an 8B Llama shape, to benchmarks/results_gpu.json
	@$(BIN)/python benchmarks/gpu.py

peers: venv ## libraries to compare with, into .peers, without touching .venv
	$(call quiet,$(BIN)/python -m pip install --no-deps --target .peers/nnsight nnsight==0.8.1 greenlet zstandard)
	$(call quiet,$(BIN)/python -m pip install --no-deps --target .peers/pyvene pyvene==0.1.8 plotnine mizani)
	$(call quiet,$(BIN)/python -m pip install --no-deps --target .peers/steering-vectors steering-vectors==0.12.2)

tutorials: venv ## run every tutorial, how-to and explanation and store the outputs; those may download
	@HF_HUB_OFFLINE=1 $(BIN)/python experiments/train_mixture.py # for the tutorial on experts; does nothing where its model is there
	@set -e; for nb in nbs/tutorials/*.ipynb nbs/how_to/*.ipynb nbs/explanations/*.ipynb; do test -e "$$nb" || continue; echo "== $$nb"; \
	  PLOTLY_RENDERER=plotly_mimetype+notebook_connected $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace --ExecutePreprocessor.timeout=3600 "$$nb"; $(BIN)/nbdev_clean --fname "$$nb"; done

clean: ## remove what can be made again; .venv and runs stay
	@rm -rf _proc _docs .tl43 build dist .pytest_cache .hypothesis nbs/nbdev.yml nbs/sidebar.yml
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print | xargs rm -rf
