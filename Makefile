# Set-up and the everyday commands. Everything is installed into .venv from the hashed lists in requirements/.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
UV ?= uv
JOBS ?= 2

BIN := .venv/bin
# The lists are complete, so pip has nothing to resolve.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-deps
LOCK := $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make requirements"

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- run ---------------------------------------------------------------------------------------------------

.PHONY: demo
demo: .venv/client.stamp ## three cells, nine servers, then it keeps serving; PORT=8774 DEMO_ONESHOT=1
	@$(BIN)/cellway demo --data .demo $(if $(PORT),--port $(PORT)) $(if $(filter-out 0,$(DEMO_ONESHOT)),--oneshot)

.PHONY: demo-clean
demo-clean: ## remove the demo's data
	@rm -rf .demo

.PHONY: serve
serve: .venv/client.stamp ## a control plane of your own, kept in .cellway; PORT=8774
	@$(BIN)/cellway up --cells 3 --hosts-per-cell 4 --data .cellway $(if $(PORT),--port $(PORT))

# ---- check -------------------------------------------------------------------------------------------------

.PHONY: test
test: static ## everything: format, lint, types, layers, and all tests
	@$(BIN)/pytest --numprocesses $(JOBS) --dist loadscope

.PHONY: check
check: static ## the same without the slow and the acceptance tests, in under two minutes
	@$(BIN)/pytest --numprocesses $(JOBS) --dist loadscope --ignore tests/acceptance -m "not slow"

.PHONY: static
static: .venv/dev.stamp
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

.PHONY: fmt
fmt: .venv/dev.stamp ## format, and mend what can be mended
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

.PHONY: bench
bench: .venv/dev.stamp ## CPU per operation, next to a floor measured in the same run; DATABASE=postgresql or mariadb
	@$(BIN)/python -m benchmarks $(if $(DATABASE),--database $(DATABASE))

.PHONY: bench-rpc
bench-rpc: .venv/dev.stamp ## the same of calls and casts, in memory and over RabbitMQ
	@$(BIN)/python -m benchmarks --rpc

.PHONY: bench-migration
bench-migration: .venv/dev.stamp ## rows per second that leave the cells, by the size of a batch; DATABASE=postgresql or mariadb
	@$(BIN)/python -m benchmarks --migration $(if $(DATABASE),--database $(DATABASE))

.PHONY: soak
soak: .venv/dev.stamp ## break separate processes on real servers for an hour or two, into docs/faults.md; DATABASE=mariadb
	@$(BIN)/python -m tests.soak --database $(or $(DATABASE),postgresql) --write docs/faults.md
	@$(BIN)/python -m tests.quota_soak --database $(or $(DATABASE),postgresql) --write docs/faults.md

.PHONY: soak-migration
soak-migration: .venv/dev.stamp ## kill the command that moves limits, 3 x 20,000 of them, into docs/migration-runs.md; DATABASE=sqlite
	@$(BIN)/python -m tests.migration_soak --database $(or $(DATABASE),sqlite) --write docs/migration-runs.md

# ---- install -----------------------------------------------------------------------------------------------

.venv/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "error: Cellway needs Python 3.11 or later; name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing into .venv"
	@"$(PYTHON)" -m venv .venv

.venv/client.stamp: .venv/pyvenv.cfg requirements/client.txt pyproject.toml
	@$(INSTALL) --require-hashes --requirement requirements/client.txt
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

# The list holds all of requirements/client.txt, in the same versions.
.venv/dev.stamp: .venv/pyvenv.cfg requirements/dev.txt pyproject.toml
	@$(INSTALL) --require-hashes --requirement requirements/dev.txt
	@$(INSTALL) --no-build-isolation --editable .
	@touch .venv/client.stamp $@

.PHONY: requirements
requirements: ## write requirements/ anew from pyproject.toml (needs uv); UPGRADE=1 takes the newest of everything
	@$(LOCK) $(if $(UPGRADE),--upgrade) --annotation-style line --all-extras --group dev --output-file requirements/dev.txt
	@$(LOCK) --no-annotate --constraint requirements/dev.txt --extra client --group build \
		--output-file requirements/client.txt
	@$(LOCK) --no-annotate --constraint requirements/dev.txt --extra postgresql --extra mysql \
		--output-file requirements/runtime.txt

.PHONY: clean
clean: ## remove .venv and every cache; data stays
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .grimp_cache build dist
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
