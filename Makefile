# Every task of this repository, one line each: `make help`. A first `make chat` or `make test` sets up .venv by
# itself; all that set-up says goes to stderr, so that `echo "Hello" | make chat` prints the reply and nothing else.
#
#   make chat PYTHON=python3.12     choose the interpreter (default: the first of $(PYTHONS) that will do)
#   make chat TORCH=cpu             choose the build of torch: cpu or cuda (default: cuda where there is an NVIDIA GPU)
#   make chat MODEL=./my-model      chat with another checkpoint (so does make serve)
#   make test ARGS="-k rope -x"     hand arguments to pytest

VENV    := .venv
BIN     := $(VENV)/bin
# Settings of a person's pip that would put packages elsewhere do not hold here; where it finds them, it may say.
PIP     := env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_REQUIRE_HASHES PIP_USER=0 \
	$(BIN)/python -m pip -q --disable-pip-version-check --no-input
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
MODEL   := nano
TORCH    = $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help chat serve test check lint types layers docs fmt bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

chat: $(VENV)/.runtime ## chat with the model that ships (a prompt on stdin is answered once)
	@$(BIN)/dsv3 chat $(MODEL)

serve: $(VENV)/.runtime ## serve it: OpenAI's API at http://localhost:8000/v1, a page to chat on at /
	@$(BIN)/dsv3 serve $(MODEL)

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

check: lint types layers docs ## run every check: lint, types, layers, docs

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy --strict on the package
	$(BIN)/mypy

layers: $(VENV)/.dev ## import-linter: lower layers never import higher ones
	$(BIN)/lint-imports

docs: $(VENV)/.dev ## links, code blocks, commands and paths that the documents name
	$(BIN)/python -m pytest tests/test_repo.py

fmt: $(VENV)/.dev ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## measure dsv3 against transformers on one random checkpoint
	$(BIN)/python benchmarks/vs_transformers.py $(ARGS)

lock: $(BIN)/pip ## resolve requirements.lock and requirements-dev.lock anew
	@$(PIP) install uv
	$(LOCK) --extra serve --group build -o requirements.lock
	$(LOCK) --extra dev -c requirements.lock -o requirements-dev.lock

LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile -q pyproject.toml --upgrade --universal \
	--python-version 3.11 --no-annotate --no-emit-package torch --no-emit-package triton

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: each step leaves a stamp in .venv and is not done again until what it reads changes ----

# A virtual environment works only where it was made, with the interpreter it was made from.
MOVED := $(shell [ -f $(VENV)/.place ] && { [ "$$(cat $(VENV)/.place)" = "$(CURDIR)" ] && [ -x $(BIN)/python ] || \
	rm -rf $(VENV); })

$(BIN)/pip:
	@for python in $(PYTHONS) ""; do \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && break; \
	done; \
	[ "$$python" ] || { echo "make: dsv3 needs Python 3.11 to 3.14, and none of these is one: $(PYTHONS)." \
	    "Install one, or name it: make chat PYTHON=/path/to/python3.12"; exit 1; } >&2; \
	echo "dsv3: first run, setting up $(VENV) with $$python (a minute or two)" >&2; \
	"$$python" -m venv $(VENV) >&2 || { rm -rf $(VENV); echo "make: $$python cannot make a virtual environment." \
	    "On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; } >&2
	@echo "$(CURDIR)" >$(VENV)/.place

# The Linux torch on PyPI is the CUDA build and brings gigabytes of NVIDIA packages. Where there is no NVIDIA GPU we
# therefore ask by name for the CPU build (+cpu): first wherever pip is configured to look (a mirror, a folder of
# wheels), then PyTorch's own CPU index, giving up on it quickly; only if neither has it, the one on PyPI, which
# works as well and is only bigger. The CPU build needs nothing that requirements.lock has not.
$(VENV)/.torch: requirements-torch.lock | $(BIN)/pip
	@torch=$$(cat requirements-torch.lock); \
	if [ "$(TORCH)" = cpu ] && [ "$$(uname)" = Linux ]; then \
	    $(PIP) install --no-deps "$$torch+cpu" 2>/dev/null || \
	    $(PIP) install --no-deps "$$torch+cpu" --index-url https://download.pytorch.org/whl/cpu \
	        --retries 1 --timeout 10 2>/dev/null || \
	    { echo "dsv3: found no CPU build of torch; taking the larger CUDA build from the package index"; \
	      $(PIP) install "$$torch" -c requirements.lock; }; \
	else \
	    $(PIP) install "$$torch" -c requirements.lock; \
	fi </dev/null >&2
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch requirements.lock pyproject.toml
	@$(PIP) install --no-deps -r requirements.lock </dev/null >&2
	@$(PIP) install --no-deps --no-build-isolation -e . </dev/null >&2
	@$(BIN)/python -c 'import torch' || { rm $(VENV)/.torch; exit 1; }
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	@echo "dsv3: installing what tests and checks need" >&2
	@$(PIP) install --no-deps -r requirements-dev.lock </dev/null >&2
	@touch $@
