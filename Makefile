# Two commands do everything: `make run` executes the series, `make test` runs the fast tests.
PYTHON ?= python3
# One torch that is known to work. To choose your own build, for example PyTorch's CPU index: make TORCH="torch --index-url …"
TORCH ?= torch==2.13.0
OUT ?= runs/demo
BIN := .venv/bin
READY := .venv/.ready
FULL := .venv/.ready-full
FAST_NOTEBOOKS := $(wildcard notebooks/0[1-4]_*.ipynb)
NBVAL := $(BIN)/python -m pytest --nbval --nbval-current-env --nbval-sanitize-with tests/notebooks/sanitize.cfg -p no:cacheprovider

.PHONY: help install run test test-full lint notebooks figures docs clean set-repo colab-list test-versions

help:
	@echo "make run        execute notebooks 01-07 on this machine into $(OUT), and compare"
	@echo "make test       the fast tests (minutes)"
	@echo "make test-full  the long ones too; compiles llama.cpp once (a C++ compiler)"
	@echo "make test-versions  the unit tests on the oldest, the newest and Colab's versions (gigabytes)"
	@echo "make notebooks  execute the notebooks and store their outputs (CPU profile)"
	@echo "make figures    redraw figures/ and the README's tables from results/"
	@echo "make docs       build the pages of docs/ into site/; a dead link fails"
	@echo "make set-repo URL=https://github.com/NAME/REPOSITORY   point badges and notebooks to your copy"
	@echo "make colab-list fetch Colab's list of packages anew"

install: $(READY)

$(READY): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt --editable .
	@touch $@

$(FULL): $(READY) requirements-full.txt
	@echo "Compiling llama.cpp, once: some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-full.txt
	@touch $@

run: $(READY)
	$(BIN)/python -m qlora_helpers fetch
	$(BIN)/python -m qlora_helpers run --profile cpu --out $(OUT)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m qlora_helpers fetch
	QLORA_WORKDIR=$$(mktemp -d) $(NBVAL) $(FAST_NOTEBOOKS)
	# Two processes of one thread each; without reordering, the longest file, the series, begins first.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-full: $(FULL) test
	QLORA_WORKDIR=$$(mktemp -d) $(NBVAL) $(filter-out $(FAST_NOTEBOOKS),$(wildcard notebooks/*.ipynb))
	$(BIN)/python -m pytest -m slow

test-versions: $(READY)
	$(BIN)/python tooling/versions.py oldest newest colab

notebooks: $(READY)
	$(BIN)/python tooling/store_outputs.py

figures: $(READY)
	$(BIN)/python tooling/publish.py

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

set-repo: $(READY)
	$(BIN)/python tooling/set_repository.py "$(URL)"

colab-list: $(READY)
	$(BIN)/python tooling/colab_list.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-colab build dist *.egg-info
