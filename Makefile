# `make demo` and `make test` are all a newcomer needs; both make their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROOMS := launcher parallel models kernels data_pipeline training tools
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
CORPUS := data/stdlib-512
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help install install-dev demo test test-slow lint clean

help:
	@echo "make demo       install, prepare a corpus, train a hybrid language model through Ray, sample from it"
	@echo "make test       install the development extras and run the test suite"
	@echo "make test-slow  the tests that take long"
	@echo "make lint       ruff and mypy"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Where the CPU build of torch is wanted, pip needs the exact version: constraints.txt has it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing triptych into $(VENV) (about a minute) ..."
	$(PIP_INSTALL) --editable ".[digits]"
	@touch $@

# Other people's kernels, which tests and `triptych bench kernels` hold ours against.
PEERS := flash-linear-attention==0.6.0 fla-core==0.6.0 liger-kernel==0.8.5 einops==0.8.2

# timm stands aside, for tests alone: PyPI's torchvision does not load beside a CPU build of torch, and where it is
# installed transformers and diffusers import it.
$(VENV)/.installed-dev: pyproject.toml constraints.txt Makefile | $(BIN)/python
	@echo "Installing triptych and its development extras into $(VENV) (about two minutes) ..."
	$(PIP_INSTALL) --editable ".[dev,digits,hf,megatron]"
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/timm timm torchvision
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/peers $(PEERS)
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/triptych data text --source stdlib --vocab-size 512 --out $(CORPUS)
	$(BIN)/triptych train configs/lm/demo.yaml --run-dir $(RUN)
	$(BIN)/triptych evaluate $(RUN) --baseline
	$(BIN)/triptych sample $(RUN) --prompt "def __init__(self" --prompt "import os" --max-new-tokens 96
	@echo "Curves: $(BIN)/tensorboard --logdir $(RUN)"

# `python -m pytest` would put the rooms on the import path under their bare names, and `kernels` is a known package.
test: $(VENV)/.installed-dev
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

# mypy sees the rooms under the names they are imported by.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lint && mkdir -p build/lint/triptych
	@for room in $(ROOMS); do ln -s ../../../$$room build/lint/triptych/$$room; done
	cd build/lint && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p triptych

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
