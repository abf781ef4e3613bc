# Development tasks; `make` lists them. Everything runs in .venv, which `make env` creates.
#
#   make env PYTHON=/path/to/python3.12
#   make env PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#       avoids PyTorch's CUDA build (several GB) on a machine without a GPU
#   make quickstart CORPUS=/path/to/text
#   make test TESTS=tests/unit

# The stamp's name is a checksum of what was installed: a change of either file installs again.
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
IS_SUPPORTED := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
# bitscale, deepspeed and torchrun are found by scripts and tests as an activated .venv offers them.
IN_ENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help env test test-all quickstart reproduce lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## Create .venv with the pinned packages and bitscale itself, editable

# A candidate must run: pyenv leaves shims of versions that are not active. The stamp comes last
# and the old one goes first, so that an interrupted installation is never taken for a whole one.
$(STAMP):
	@for python in $(PYTHON) python3.11 python3.12 python3; do \
	  if $$python -c '$(IS_SUPPORTED)' >/dev/null 2>&1; then \
	    echo "+ $$python -m venv .venv  # $$($$python --version)"; \
	    rm -f .venv/.installed-*; \
	    exec $$python -m venv .venv; \
	  fi; \
	done; \
	echo "error: no Python 3.11 or 3.12 with venv among: $(PYTHON) python3.11 python3.12 python3;" \
	  "install one (apt install python3.11-venv) or name it: make env PYTHON=/path/to/python3.11" >&2; \
	exit 1
	.venv/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# Unit tests run side by side. Ranks of tests/dist want the machine and live to the end of their
# pytest; tests/e2e mostly starts single processes one after the other, which leave a core idle.
test: env ## Run the tests (all groups but slow ones, or TESTS=tests/unit)
ifdef TESTS
	$(IN_ENV) python -m pytest $(TESTS) --durations=10
else
	$(IN_ENV) python -m pytest tests/unit -m 'not slow' -n auto --maxprocesses 8 --dist loadfile --durations=10
	$(IN_ENV) python -m pytest tests/dist -m 'not slow' --durations=10
	$(IN_ENV) python -m pytest tests/e2e -m 'not slow' -n 2 --dist loadfile --durations=10
endif

test-all: test ## The slow tests, too
	$(IN_ENV) python -m pytest tests/unit tests/dist tests/e2e -m slow --durations=10

quickstart: env ## Prepare, train, switch, export, evaluate on this machine (CORPUS=path: your text)
	$(IN_ENV) launch/quickstart.sh $(if $(CORPUS),--corpus '$(CORPUS)')

# About three hours on two idle cores; SCALE=steady the same with a gentler start and other seeds,
# SCALE=h200 a larger one on GPUs. Interrupt it, run it again.
SCALE ?= small
reproduce: env ## The claims of the papers, swept and judged (SCALE=small, steady or h200, CORPUS=path)
	$(IN_ENV) launch/reproduce.sh --scale $(SCALE) $(if $(CORPUS),--corpus '$(CORPUS)')

lint: env ## Check style, types, import layers and the Dockerfile
	$(IN_ENV) ruff check .
	$(IN_ENV) ruff format --check .
	$(IN_ENV) mypy
	$(IN_ENV) lint-imports --no-logo
	@$(IN_ENV) && if command -v hadolint >/dev/null; then \
	  echo 'hadolint docker/Dockerfile'; hadolint --config docker/hadolint.yaml docker/Dockerfile; \
	else echo 'hadolint skipped: it has no wheel for this platform'; fi

format: env ## Format and mend what ruff can mend
	$(IN_ENV) ruff check --fix .
	$(IN_ENV) ruff format .

clean: ## Remove caches and build outputs (.venv and runs stay)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
