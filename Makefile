# `make demo` runs the main job, `make test` passes the tests. Both set up a .venv first, when it is not current.
VENV   ?= .venv
STAMP  := $(VENV)/.emguard-ready
export HF_HUB_OFFLINE = 1
export AXOLOTL_DO_NOT_TRACK = 1
export TOKENIZERS_PARALLELISM = false
# Bytecode is kept: where it is switched off, each of a hundred processes compiles Axolotl and its libraries again.
export PYTHONDONTWRITEBYTECODE =

# The first of these that runs; those that pyenv keeps are found although they are not switched on.
FIND_PYTHON = for v in 3.11 3.12 3.13; do \
    for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*/bin/python python3; do \
      [ "$$("$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = $$v ] && echo "$$p" && exit; \
    done; done
PYTHON ?= $(shell $(FIND_PYTHON))

# Axolotl 0.19 is the last that Python 3.11 is offered. Two stacks have no Axolotl: `newest` (of what Axolotl holds back) and `lowest`
# (what pyproject.toml says is enough).
RUNS  = $(shell for p in $(VENV)/bin/python "$(PYTHON)"; do "$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null && break; done)
STACK ?= $(if $(filter 3.11,$(RUNS)),axolotl-0.19,axolotl-0.21)
LOCK  = constraints/$(STACK).txt

# uv has settings of its own: the certificates and the package index that pip was pointed at are its as well.
UV_LIKE_PIP = UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 \
    UV_DEFAULT_INDEX="$$($(VENV)/bin/python -m pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)"

.PHONY: demo test test-all check clean browser lock lock-of-bounds lock-of-axolotl compat zero
demo: $(STAMP)
	$(VENV)/bin/emguard demo

# Two processes with a thread each; a file stays in one of them, so that Axolotl is imported once in each.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

# What a reader would find, found by tools.
check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy

# Changes the machine, so nothing else calls it: the test of the reports in a real browser is skipped without one.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1; } || \
	  echo "no chromium here: the reports' browser test will be skipped"

# torch first, by pip and by itself, so that a CPU build that pip was pointed at is kept. Then the locked rest, unresolved: by uv where
# the package index has it (12 s), else by pip (2 min).
$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@[ -x $(VENV)/bin/python ] || [ -n "$(PYTHON)" ] || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed and none was found. Install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@[ -x $(VENV)/bin/python ] || "$(PYTHON)" -m venv $(VENV)
	@$(VENV)/bin/python -c 'import torch' 2>/dev/null || \
	  ! $(VENV)/bin/python -m pip install -q --dry-run --report - -c $(LOCK) torch 2>/dev/null | grep -q '"nvidia-' || \
	  echo "torch comes with CUDA from this package index: several GB are loaded. Point pip at a CPU build to avoid it."
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile -c $(LOCK) torch
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile uv || echo "no uv here: pip installs the rest"
	grep -v '^torch==' $(LOCK) > $(VENV)/locked.txt
	if [ -x $(VENV)/bin/uv ]; then $(UV_LIKE_PIP) $(VENV)/bin/uv pip install -q --python $(VENV)/bin/python --no-deps -r $(VENV)/locked.txt; else false; fi || \
	  $(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile --no-deps -r $(VENV)/locked.txt
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

# Resolve anew what pyproject.toml asks for, with Axolotl's own pins: of the stack of PYTHON. What torch brings is left to torch.
BROUGHT = ^(cuda-|nvidia-[^m])
lock:
	$(if $(filter newest lowest,$(STACK)),$(MAKE) lock-of-bounds STACK=$(STACK),$(MAKE) lock-of-axolotl)
lock-of-bounds:
	@[ -x $(VENV)/bin/uv ] || { echo "uv resolves these: run \`make $(STAMP)\` first"; exit 1; }
	{ sed -n '/^#/p' $(LOCK); $(UV_LIKE_PIP) $(VENV)/bin/uv pip compile -q pyproject.toml --extra sae --extra judge --extra dev --no-header \
	  --no-annotate $(if $(filter newest,$(STACK)),--python-version 3.13 -P 'torch<2.15',--python-version 3.11 --resolution lowest-direct) | \
	  grep -vE '$(BROUGHT)'; } > build/lock.txt
	mv build/lock.txt $(LOCK)
lock-of-axolotl:
	rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install -q torch
	build/lock/bin/python -m pip install -q -e ".[all,dev]"
	{ sed -n '/^#/p' $(LOCK); build/lock/bin/python -m pip freeze --exclude-editable | grep -vE '$(BROUGHT)' | \
	  sed -E 's/^(torch==[^+]*)\+.*/\1/; \
	  s/^(zstandard==.*)/\1 ; python_version < "3.13"\nzstandard==0.25.0 ; python_version >= "3.13"/'; } > build/lock.txt
	mv build/lock.txt $(LOCK)

# Every stack that is claimed, in an environment and by a Python of its own; several GB each. STACKS and TESTS choose; `make compat
# STACKS="newest lowest"`. Writes what passed where into README.md.
compat:
	@"$(PYTHON)" benchmarks/compat.py $(STACKS) $(if $(TESTS),--tests $(TESTS))

# DeepSpeed compiles nothing for CPUs; gloo does without.
zero: $(STAMP)
	@$(VENV)/bin/python -c 'import deepspeed' 2>/dev/null || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VENV)/bin/python -m pip install -q \
	  --disable-pip-version-check --no-build-isolation -c $(LOCK) 'deepspeed>=0.18.6,<0.20'
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/distributed/test_zero3.py tests/distributed/test_engines.py

# ./demo goes only if `emguard demo` made it.
clean:
	rm -rf $(VENV) build dist
	[ ! -f demo/.emguard ] || rm -rf demo
