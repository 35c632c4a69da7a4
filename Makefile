# `make demo` and `make test` are all a newcomer needs: each makes or refreshes .venv first.
PYTHON ?= python3
BIN := .venv/bin
NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11) and "dmjd needs Python 3.11: make PYTHON=python3.11 ...")'
SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
export OMP_WAIT_POLICY ?= PASSIVE
# pip compiles no modules (below), so each is compiled where it is first imported.
# Kept, they make a start three times as fast, and the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all check lint docs bench bench-check study-quick format clean

demo: .venv/installed
	$(BIN)/dmjd pretrain --preset quick --data shapes --out runs/demo-$$(date +%Y%m%d-%H%M%S)

# Five processes side by side, on two cores: what starts processes of its own often waits for them.
RANKS := tests/engine
FAULTS := tests/faults
VERBS := tests/tasks
PAGES := tests/inputs tests/equality tests/readme tests/test_extending.py
TESTS := test-ranks test-faults test-verbs test-pages test-rest
.PHONY: $(TESTS)
KIND ?= not slow and not long
PYTEST = $(BIN)/python -m pytest -m "$(KIND)" --durations 12
test: .venv/installed
	$(MAKE) --jobs 5 $(SYNC) $(TESTS)

test-ranks:
	$(PYTEST) $(RANKS)

test-faults:
	$(PYTEST) $(FAULTS)

test-verbs:
	$(PYTEST) $(VERBS)

test-pages:
	$(PYTEST) $(PAGES)

test-rest:
	$(PYTEST) $(addprefix --ignore=,$(RANKS) $(FAULTS) $(VERBS) $(PAGES))

test-all: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(MAKE) --jobs 6 $(SYNC) KIND="not slow" lint $(TESTS)

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Guides, tables and the reference from the docstrings: site/index.html
docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Races of steps against plain forms, and counts of what a step needs: docs/results/bench. Hours, of a quiet machine.
bench: .venv/installed
	$(BIN)/python benchmarks/race.py all
	$(BIN)/python benchmarks/counts.py

# The main ordering of the studies anew, in a quarter of an hour; IMAGES is a folder of CIFAR-10, train/CLASS/IMAGE and
# test/CLASS/IMAGE. `git diff docs/results/quick.md` then says what came out otherwise.
study-quick: .venv/installed
	rm -rf docs/results/quick
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study.py run benchmarks/studies/quick.yaml --data $(IMAGES) --jobs 2
	$(BIN)/python benchmarks/study_tables.py quick

# Counted again: fails where a step needs more than what is stored. Three minutes.
bench-check: .venv/installed
	$(BIN)/python benchmarks/counts.py check

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An editable install: only a change of pyproject.toml needs another one. Python compiles what it imports; all at once
# would take a minute.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || { $(PYTHON) -c $(NEW_ENOUGH) && $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
