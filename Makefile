# make demo | test | test-full | test-gpu | test-browser | check | fix | bench | bench-train | bench-export | peers | ablation | emoji-data | emoji-teacher | emoji-model
# PYTHON is the interpreter that the virtual environment is made with; everything else happens inside $(VENV).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE := training/recipes/nitro-emoji.toml
TEACHER_RECIPE := training/recipes/nitro-emoji-teacher.toml

ONE_STEP := engines/nitro-emoji-1step
MANY_STEPS := engines/nitro-emoji-124steps

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# In the environment, the constraints reach the build back-end of the editable install too; -c alone does not.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-gpu test-browser check fix bench bench-train bench-export peers ablation emoji-data emoji-teacher emoji-model

help:
	@echo 'make demo           build the shipped model for 1 and for 1, 2 and 4 steps, and draw two sheets into demo/'
	@echo 'make test           the tests, without the slow ones'
	@echo 'make test-full      all tests'
	@echo 'make test-gpu       the tests that need an NVIDIA GPU, on it, with a report'
	@echo 'make test-browser   the committed reports in Chromium, as on a phone and on a desk'
	@echo 'make check          lint, format, types, import contracts'
	@echo 'make fix            mend what lint and format can mend'
	@echo 'make bench          the lean runtime beside diffusers, into benchmarks/reports/'
	@echo 'make emoji-data     fetch the icon packs (npm) and render the training data into data/'
	@echo 'make emoji-teacher  train its teacher from nothing, resuming where it stopped'
	@echo 'make emoji-model    distil the shipped model again from its teacher, resuming where it stopped'
	@echo 'make peers          the environments of the other ways to draw that nitro-rt bench --peers compares with'
	@echo 'make bench-train    training speed and memory for growing pools, beside a plain LADD-style loop'
	@echo 'make bench-export   export, quantisation, build and speed at full size, beside the peers; hours, kept in pieces'
	@echo 'make ablation       the ablation table of the method, resuming where it stopped'

# --- set-up -----------------------------------------------------------------------------------------------------------
# A stamp says what is installed and is older than its inputs when they change. The demo needs less than the tests, so it
# has a stamp of its own; the full set covers it. Two targets of one `make -j` would install into one environment: never.
.NOTPARALLEL:

# $(call install,EXTRAS): a virtual environment with these extras, at the exact versions of constraints.txt.
define install
@command -v $(PYTHON) >/dev/null || { echo "'$(PYTHON)' is not here; name a Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), nitro-rt needs 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
$(PYTHON) -m venv $(VENV)
$(PIP) install --quiet --editable '.[$(1)]'
endef

$(VENV)/.demo-stamp: pyproject.toml constraints.txt
	$(call install,cpu$(comma)export)
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml constraints.txt
	$(call install,dev)
	@touch $@ $(VENV)/.demo-stamp

comma := ,

# --- the two commands of the README -------------------------------------------------------------------------------------
demo: $(VENV)/.demo-stamp
	$(BIN)/nitro-rt build --steps 1 --out $(ONE_STEP)
	$(BIN)/nitro-rt build --steps 1,2,4 --out $(MANY_STEPS)
	$(BIN)/python examples/demo.py --one-step $(ONE_STEP) --many-steps $(MANY_STEPS) --out demo

test: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest

test-full: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest --slow

test-gpu: $(VENV)/.dev-stamp
	$(BIN)/python -m nitro_bench.gpu --report benchmarks/reports

test-browser: $(VENV)/.dev-stamp
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { echo 'no Chromium is here: apt install chromium' >&2; exit 1; }
	$(PIP) install --quiet --editable '.[browser]'
	$(BIN)/python -m pytest tests/nitro_bench/test_page_in_a_browser.py

# --- checks -------------------------------------------------------------------------------------------------------------
check: $(VENV)/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m nitro_bench.quoted README.md
	$(BIN)/python -m pytest -q tests/test_repository.py -k tracked_files

fix: $(VENV)/.dev-stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev-stamp
	$(BIN)/nitro-rt build --steps 1 --out $(ONE_STEP)
	$(BIN)/python -m nitro_bench.lean $(ONE_STEP) --checkpoint nitro_rt/models/nitro-emoji --report benchmarks/reports

bench-train: $(VENV)/.dev-stamp
	$(BIN)/python -m nitro_bench.training --report benchmarks/reports

# Hours at full size: what is measured stays in runs/bench-export, and the next run goes on from there. optimum's exporter has an
# environment of its own, since it needs older versions of what nitro-rt is built on.
OPTIMUM := runs/bench-export/optimum
bench-export: $(VENV)/.dev-stamp $(OPTIMUM)/.stamp
	$(BIN)/python -m nitro_bench.export --work runs/bench-export --optimum-python $(OPTIMUM)/bin/python --report benchmarks/reports

$(OPTIMUM)/.stamp: benchmarks/nitro_bench/export-peer-requirements.txt
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --requirement $<
	@touch $@

# One environment per peer, without pip, so that all that it holds is the peer's. Those for a GPU are made where there is one.
PEERS := diffusers onnxruntime openvino-genai optimum-intel $(if $(wildcard /dev/nvidiactl),torch-tensorrt onnxruntime-gpu)
PEER_PINS := benchmarks/nitro_bench/peers/requirements
peers: $(PEERS:%=runs/peers/%/.stamp)

# $(call peer_install,OPTIONS): an environment that could not be filled is taken away again.
peer_install = $(BIN)/python -m pip --python $(@D)/bin/python install --quiet $(1) || { rm -rf $(@D); exit 1; }

runs/peers/%/.stamp: $(PEER_PINS)/%.txt | $(VENV)/.dev-stamp
	rm -rf $(@D)
	$(PYTHON) -m venv --without-pip $(@D)
	$(call peer_install,--requirement $<)
	$(if $(wildcard $(PEER_PINS)/$*-no-deps.txt),$(call peer_install,--no-deps --requirement $(PEER_PINS)/$*-no-deps.txt))
	@touch $@

runs/peers/onnxruntime/.stamp runs/peers/onnxruntime-gpu/.stamp: $(PEER_PINS)/optimum-onnx.txt
runs/peers/torch-tensorrt/.stamp: $(PEER_PINS)/diffusers.txt
runs/peers/optimum-intel/.stamp: $(PEER_PINS)/optimum-intel-no-deps.txt

# It starts from the one-step weights of nitro-emoji's own run where that is here, and trains some otherwise.
ablation: $(VENV)/.dev-stamp
	$(BIN)/python -m nitro_training.ablation --recipe training/recipes/ablation.toml --out runs/ablation \
	  $(if $(wildcard runs/nitro-emoji/regression.safetensors),--init runs/nitro-emoji) --report docs/ablation.md

# --- the shipped model --------------------------------------------------------------------------------------------------
# --ignore-scripts: the packs are data, nothing of theirs runs.
emoji-data: $(VENV)/.dev-stamp
	@command -v npm >/dev/null || { echo "npm is not here; the icon packs are npm packages, install Node.js first" >&2; exit 1; }
	mkdir -p data/npm
	cp training/recipes/icon-packs.json data/npm/package.json
	npm install --prefix data/npm --no-audit --no-fund --ignore-scripts --no-package-lock
	$(PIP) download --quiet --no-deps --dest data open_clip_torch
	$(BIN)/python -m nitro_training.emoji --npm data/npm/node_modules --out data/nitro-emoji --recipe $(TEACHER_RECIPE)

emoji-teacher: $(VENV)/.dev-stamp
	$(BIN)/nitro-rt train $(TEACHER_RECIPE) --out runs/nitro-emoji-teacher --resume

emoji-model: $(VENV)/.dev-stamp
	$(BIN)/nitro-rt train $(RECIPE) --out runs/nitro-emoji --resume
