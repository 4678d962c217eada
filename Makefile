# Everything here needs Python 3.11+ and make; the environment is made when missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/$(shell date +%Y%m%d-%H%M%S)
# Where it is set, as in many images, each of Ray's processes compiles anew all that it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test lint bench environment clean

environment: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Towers needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: $(STAMP)
	$(BIN)/towers train --run $(RUN)

test: $(STAMP)
	$(BIN)/python -m pytest

# Tables of figures and ratios, in bench/ as JSON and Markdown with the machine's description.
bench: $(STAMP)
	mkdir -p bench
	failed=; for name in step stream remote scaling startup; do \
	  $(BIN)/python benchmarks/$$name.py --json bench/$$name.json || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
