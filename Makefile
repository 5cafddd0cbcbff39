# make demo    the main job, end to end (under 5 minutes on 2 cores)
# make test    format, lint and types (make check), then the test suite; `make test TORCH=2.14.1` runs it on the newest torch, TORCH=2.13.0 (the default) on the oldest
#              (on every core; ARGS='-k name' instead picks tests)
# make test-all  the same with the tests that are marked slow: every family of models, every variant of a callback
# make test-deploy   tests/deploy where every runtime is installed, LiteRT and ExecuTorch too (elsewhere their tests skip): torch 2.13.0, in .venv-deploy
# make check   formatting, lint and types, as pre-commit and CI run them
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv$(if $(filter-out 2.13.0,$(TORCH)),-$(TORCH))
PIP_FLAGS ?=
ARGS ?= -n auto --dist loadfile
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all test-deploy check clean
demo: $(VENV)/.demo
	$(BIN)/torchopt-passes demo --out demo_output

test: check
	$(BIN)/python -m pytest -q $(ARGS)

test-all: check
	$(BIN)/python -m pytest -q -m "" $(ARGS)

test-deploy:
	$(MAKE) VENV=.venv-deploy TORCH=2.13.0 .venv-deploy/.dev,deploy
	.venv-deploy/bin/python -m pytest -q -m "" $(ARGS) tests/deploy

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .venv-deploy demo_output

# torch first and pinned, so that nothing pulls another build of it
$(VENV)/.torch: 
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip<27"
	$(BIN)/python -m pip install $(PIP_FLAGS) "torch==$(TORCH)"
	touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.dev,deploy: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q $(PIP_FLAGS) "torch==$(TORCH)" -e ".[$*]"
	touch $@
