# make demo   set up, train one model over five modalities of small landscapes, evaluate it, draw gallery.png
# make demo-digits  the same over four modalities of handwritten digits
# make test   set up, then lint, type-check and test
# make test-long   what of the tests takes longest, and needs a browser
# make docs   set up, then build the documentation as a site: site/index.html
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: setup install demo demo-digits test test-long lint types format docs docs-serve clean

setup: $(VENV)/.developed
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "setting up $(VENV): torch and its libraries, about 6 GB; minutes, without a word from pip"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	@echo "adding to $(VENV) what development needs, about 1 GB"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: install
	$(BIN)/mtdiffusion demo --config configs/scenes-demo.toml --out $(RUN)

demo-digits: install
	$(BIN)/mtdiffusion demo --config configs/digits-demo.toml --out runs/digits

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# One thread a worker: several torch processes with several threads each slow one another down many times over.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m long

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/mkdocs build --strict

docs-serve: setup
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) runs site .mypy_cache .ruff_cache .pytest_cache
