PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
SITE_TOOLS := build/site-tools

# pip reads this in build environments too, where -c does not reach.
export PIP_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint faults docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## quantize the embedded model to W4A6 and compare it with full precision
	$(BIN)/dmquant run emoji-pixart --w fp4 --a fp6 --out $(DEMO)
	@echo "grid:   $(DEMO)/grid.png"
	@echo "report: $(DEMO)/report.html (also report.md and report.json)"

test: lint ## lint, then run all tests but those of minutes, which CI runs as well: pytest -m slow
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

faults: $(INSTALLED) ## break runs on purpose, for an hour or two: docs/faults.md
	for trial in kill writes disk-full flip overwrite fuzz; do \
	    echo "== $$trial" && $(BIN)/python -m tests.faults $$trial || exit 1; done

docs: $(SITE_TOOLS) ## build the pages as a site, in build/site; broken links fail
	NO_MKDOCS_2_WARNING=1 $(SITE_TOOLS)/bin/mkdocs build --strict

wheel: $(INSTALLED) ## build dist/dmquant-VERSION-py3-none-any.whl
	rm -rf build/lib dist  # setuptools would pack what earlier builds left in build/lib
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean: ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build/lib build/bdist.* build/site build/source $(SITE_TOOLS) dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)  # what an interrupted installation left is not trusted
	$(BIN)/pip install --editable '.[test,offline]'
	touch $@

$(SITE_TOOLS): constraints.txt  # by itself, without dmquant: what is read is the code, not an installed package
	$(PYTHON) -m venv --clear $@
	$@/bin/pip install mkdocs-material mkdocstrings-python ruff  # ruff lays out signatures
	touch $@
