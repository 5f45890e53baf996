# make quickstart | test | lint | bench | clean. The virtual environment .venv is made once and reused.

# The first of these that runs and is 3.11 or newer; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help quickstart test lint bench clean

help:
	@echo "make quickstart   the whole pipeline on the shipped images; report in runs/quickstart/report.html"
	@echo "make test         the whole test suite (at most 8 minutes on 2 cores)"
	@echo "make lint         ruff and pyright"
	@echo "make bench        every benchmark in benchmarks/ that needs no data of yours, results beside them"
	@echo "make clean        remove caches and builds; runs/ and .venv stay"

quickstart: $(READY)
	$(BIN)/troodon quickstart

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	@set -e; for script in benchmarks/bench_*.py; do echo "$$script"; \
	$(BIN)/python $$script || { [ $$? = 2 ] && echo "  left out: it needs data of yours, see its --help"; }; done

$(READY): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "python: troodon needs 3.11 or newer, found $(or $(PYTHON),none of python3.12 python3.11 python3.13 python3)" >&2; \
	echo "  install one, or name it: make PYTHON=/path/to/python3.12 quickstart" >&2; exit 2; }
	@echo "setting up .venv with $(PYTHON): downloads about 3 GB of packages (most of it PyTorch with CUDA), 6.3 GB on disk"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	echo "venv: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
