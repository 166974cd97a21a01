# The two main commands: `make run` executes the notebook series, `make test` runs the fast tests.
PYTHON ?= python3
# A version of torch that is known to work. For another build, such as one from PyTorch's CPU index: make TORCH="torch --index-url …"
TORCH ?= torch==2.13.0
OUT ?= runs/demo
BIN := .venv/bin
READY := .venv/.ready
FULL := .venv/.ready-full
FAST_NOTEBOOKS := $(wildcard notebooks/0[1-4]_*.ipynb)
NBVAL := $(BIN)/python -m pytest --nbval --nbval-current-env --nbval-sanitize-with tests/notebooks/sanitize.cfg -p no:cacheprovider

.PHONY: test-outputs test-pool help install run test test-full lint notebooks figures pictures walk docs clean set-repo colab-list test-versions lock mutants

help:
	@echo "make run            execute notebooks 01-07 into $(OUT), and compare the runs"
	@echo "make lint           ruff, mypy, import layers, spelling, the list of phrases, and numbers in notebooks"
	@echo "make test           make lint, the fast notebooks and the fast tests (minutes)"
	@echo "make test-full      also the slow ones; compiles llama.cpp once (needs a C++ compiler)"
	@echo "make test-versions  the unit tests on the oldest, newest and Colab's versions (gigabytes)"
	@echo "make mutants        plant 100 faults in the core and list those that no unit test notices (hours)"
	@echo "make notebooks      execute the notebooks with the CPU profile and store their outputs"
	@echo "make figures        draw figures/ and write the generated parts of README.md and docs/"
	@echo "make pictures       picture the widgets for docs/ in a real browser (needs Chromium)"
	@echo "make walk           picture the notebooks in JupyterLab, wide and narrow, light and dark, into build/walk"
	@echo "make docs           build docs/ as a site in site/; a broken link is an error"
	@echo "make set-repo URL=https://github.com/NAME/REPOSITORY   point badges and notebooks to your copy"
	@echo "make lock           write the installed versions and their hashes to requirements.lock"
	@echo "make colab-list     download Colab's current list of packages"

install: $(READY)

$(READY): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt --editable .
	@touch $@

$(FULL): $(READY) requirements-full.txt
	@echo "Compiling llama.cpp once; this takes some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-full.txt
	@touch $@

run: $(READY)
	$(BIN)/python -m qlora_helpers fetch
	$(BIN)/python -m qlora_helpers run --profile cpu --out $(OUT)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python tooling/phrases.py
	$(BIN)/python tooling/check_numbers.py

# The stored outputs are compared while the tests run: together they use two cores to the end.
test: lint
	$(BIN)/python -m qlora_helpers fetch
	+$(MAKE) --no-print-directory --jobs=2 test-outputs test-pool

test-outputs: $(READY)
	QLORA_WORKDIR=$$(mktemp -d) OMP_NUM_THREADS=1 $(NBVAL) $(FAST_NOTEBOOKS)

# Two processes with one thread each. Without reordering, the longest file, the series, starts first.
test-pool: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-full: $(FULL) test
	QLORA_WORKDIR=$$(mktemp -d) $(NBVAL) $(filter-out $(FAST_NOTEBOOKS),$(wildcard notebooks/*.ipynb))
	$(BIN)/python -m pytest -m slow

test-versions: $(READY)
	$(BIN)/python tooling/versions.py oldest newest colab

# Not in requirements-dev.txt: cosmic-ray brings 30 packages that nothing else needs. It goes on where it was stopped;
# to begin anew, remove build/mutants.
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "cosmic-ray>=8.4,<9" "pytest-cov>=6,<8"
	nice -n 19 $(BIN)/python tooling/mutants.py

lock: $(READY)
	@echo "# Versions with which make test and make run passed on Linux, Python 3.11, without a GPU, and the hashes of" > requirements.lock
	@echo "# their files. Without torch, which you choose. Made by: make lock" >> requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/pip freeze --exclude-editable | grep -v "^torch==\|^uv==" | $(BIN)/uv pip compile --quiet --no-deps --no-header --no-annotate --generate-hashes - >> requirements.lock

notebooks: $(READY)
	$(BIN)/python tooling/store_outputs.py

figures: $(READY)
	$(BIN)/python tooling/publish.py

# Runs of `make run` are what the pictures show.
pictures: $(FULL) run
	QLORA_PICTURES=docs QLORA_PICTURED_RUNS=$(abspath $(OUT))/exp2 $(BIN)/python -m pytest -m slow tests/notebooks/test_browser.py -k pictures
	$(BIN)/python tooling/attach_pictures.py

# The notebooks as a student sees them. With ARGS=--run, all cells run first, in a browser.
walk: $(FULL)
	$(BIN)/python tooling/walk.py $(ARGS)

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

set-repo: $(READY)
	$(BIN)/python tooling/set_repository.py "$(URL)"

colab-list: $(READY)
	$(BIN)/python tooling/colab_list.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-colab build dist *.egg-info
