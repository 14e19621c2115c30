# `make demo` runs the main job, `make test` passes the tests. Both set up a .venv first, when it is not current.
PYTHON ?= python3.11
VENV   := .venv
STAMP  := $(VENV)/.emguard-ready
export HF_HUB_OFFLINE = 1
export AXOLOTL_DO_NOT_TRACK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint clean browser
demo: $(STAMP)
	$(VENV)/bin/emguard demo

test: $(STAMP) browser
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

# The report is looked at in a real browser, where there is one or where one may be installed; else that test is skipped.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1; } || \
	  echo "no chromium here: the report's browser test will be skipped"

lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/lint-imports

# torch first and by itself: a CPU wheel that pip was pointed at is then kept.
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo build dist
