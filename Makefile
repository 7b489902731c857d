# make setup | demo | test | test-slow | test-gpu | check | docs.   Another Python: make demo PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := dev
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder

# uv reads its own variable; pip separates places by spaces, uv by commas
ifdef PIP_FIND_LINKS
empty :=
comma := ,
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
endif

# where this is set, each process compiles the sources of torch, transformers and timm anew, for 15 s and more
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow test-gpu check check-github docs
setup: $(VENV)/.installed

# uv resolves and unpacks in parallel, twice as fast as pip; without it, pip does the same
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit("STAIR needs Python 3.10 or newer, this is " \
	    + sys.version.split()[0] + ": make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)' \
	    && $(PYTHON) -m venv $(VENV); }
	@command -v uv > /dev/null || $(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip
	@uv=$$(command -v uv || { $(BIN)/python -m pip install --quiet uv && echo $(BIN)/uv; } || true); \
	    { [ -n "$$uv" ] && "$$uv" pip install --python $(BIN)/python --editable '.[$(EXTRAS)]'; } \
	    || $(BIN)/python -m pip install --editable '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(BIN)/python demo.py

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu" $(BY_FILE)

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu" $(BY_FILE) --timeout 900 --durations 30

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) check-github

SCHEMA := $(BIN)/check-jsonschema --quiet --builtin-schema
check-github: setup
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github

# the site, in build/site
docs: setup
	@$(BIN)/python -c 'import material, mkdocstrings' 2> /dev/null || $(MAKE) --always-make setup EXTRAS=dev,docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
