# Every target sets up what it needs in .venv; the second run of a target finds it ready.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: demo test test-matrix check bench docs dist clean help

demo: $(VENV)/installed-demo,cli ## show live signals from a throwaway PostgreSQL for 10 seconds
	$(BIN)/pgsignals demo --seconds 10

test: $(VENV)/installed-test ## run the tests, each on one PostgreSQL; ARGS='-k name' passes options to pytest
	$(BIN)/python -m pytest -n 3 --dist worksteal --turn=$$(date +%j) $(ARGS)

test-matrix: $(VENV)/installed-test ## run all tests on all versions of PostgreSQL that they know
	$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

# The test extra is here because mypy must see the packages that the integrations import.
check: $(VENV)/installed-dev,docs,test ## formatting, lint, types, import contracts, documentation
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sphinx-build -W -q docs docs/_build

bench: $(VENV)/installed-bench ## measure the figures that the documentation states
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/installed-docs ## build the documentation into docs/_build
	$(BIN)/sphinx-build -W -q docs docs/_build

dist: $(VENV)/installed-dist ## build into dist/ what is released, and try each in a fresh environment
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python -m build --quiet --outdir dist pgsignals_kafka
	$(BIN)/python -m build --quiet --outdir dist pgsignals_nats
	$(BIN)/python -m tests.distributions dist $(ARGS)

clean: ## remove the virtual environment, the caches and everything built
	rm -rf $(VENV) build dist docs/_build *.egg-info */*.egg-info .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip is the last thing that venv puts there, so a half-made environment is not taken for a whole.
$(BIN)/pip:
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed-%: $(wildcard pyproject.toml */pyproject.toml) | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	$(if $(findstring test,$*)$(findstring bench,$*),$(BIN)/pip install --quiet --disable-pip-version-check \
		--editable ./pgsignals_kafka --editable ./pgsignals_nats)
	@touch $@
