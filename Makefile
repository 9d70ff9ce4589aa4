# Everything from a bare Python: 'make' alone says what there is.
#
# The environment is .venv beside this file, or the conda environment that is active. It is made
# and kept current by the target 'setup', which every other target asks for first.

# 'make run PYTHON=/path/to/python3.12': the Python to build .venv with.
PYTHON ?=
# 'make run TORCH_INDEX=URL': the URL behind "--index-url" on pytorch.org/get-started.
TORCH_INDEX ?=
# 'make break CASE=twice': which of the broken models to make.
CASE ?=
# 'make rehearsal SIZE=1b': how large the made-up model is; 7b unless told.
SIZE ?=
# 'make run ARGS="04 -p model=chinese-alpaca-7b"': passed on to the command.
ARGS ?=

# conda's base environment is the user's own tool and is left alone.
CONDA := $(if $(filter base,$(CONDA_DEFAULT_ENV)),,$(CONDA_PREFIX))
ENV := $(if $(CONDA),$(CONDA),.venv)
BIN := $(if $(CONDA),$(CONDA),$(CURDIR)/.venv)/bin
IN_ENV = PATH="$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help setup run nightly lab demo break test test-fast test-heavy bench rehearsal clean

help: ## Show this list
	@echo "Usage: make TARGET (each one sets up what it needs first)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "With: PYTHON=PATH of a Python >= 3.11, ARGS=\"for the command\","
	@echo "      TORCH_INDEX=URL for another build of PyTorch (see pytorch.org/get-started)"

run: setup ## Execute the lessons on the small model that comes with the course
	@$(IN_ENV) llamalab run $(ARGS)

# Three ways in which state that a lesson leaves behind, or counts on, would show.
nightly: setup ## Prove that no lesson needs or leaves hidden state (ten minutes)
	@$(IN_ENV) python tests/nightly.py $(ARGS)

lab: setup ## Open lesson 00 in JupyterLab, for this machine only and with a token
	@$(IN_ENV) jupyter lab --ip=127.0.0.1 \
	  --LabApp.default_url=/lab/tree/notebooks/00_environment.ipynb $(ARGS)

# Voilà renders the notebook on the Jupyter server, which asks for its token. Its page would fetch
# fonts and MathJax from elsewhere; the policy forbids the browser to ask anybody but this server.
POLICY = default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws://127.0.0.1:* ws://localhost:*
demo: setup ## Serve lesson 06 as a web page without code, for this machine only and with a token
	@$(IN_ENV) jupyter server --ip=127.0.0.1 \
	  --ServerApp.tornado_settings="{'headers': {'Content-Security-Policy': \"$(POLICY)\"}}" \
	  --ServerApp.default_url=/voila/render/notebooks/06_explore_prompts.ipynb $(ARGS)

break: setup ## Make a broken model to diagnose: make break CASE=twice; without CASE, list them
	@$(IN_ENV) python -W ignore -m llamalab_course.broken_models $(CASE)

test: setup ## Check style and house rules, then run the tests, every notebook among them
	@$(IN_ENV) ruff check lib tests benchmarks notebooks
	@$(IN_ENV) python -m pytest $(ARGS)

# Without what starts notebooks, clusters, browsers, or kills what it starts.
test-fast: setup ## Style, house rules, and the quick tests
	@$(IN_ENV) ruff check lib tests benchmarks notebooks
	@$(IN_ENV) python -m pytest -m "not heavy and not slow" $(ARGS)

test-heavy: setup ## Run the tests that take minutes, gigabytes or a GPU
	@$(IN_ENV) python -m pytest -m heavy $(ARGS)

bench: setup ## Measure against cp and other programs (60 GB of disk, half an hour; ARGS="--size 1b")
	@$(IN_ENV) python benchmarks/convert.py $(ARGS)
	@$(IN_ENV) python benchmarks/merge.py $(ARGS)
	@$(IN_ENV) python benchmarks/download.py
	@$(IN_ENV) python benchmarks/run.py

rehearsal: setup ## Run lessons 00 to 04 on made-up weights of true size (45 GB; SIZE=1b for less)
	@$(IN_ENV) python benchmarks/rehearsal.py $(if $(SIZE),--size $(SIZE)) $(ARGS)

clean: ## Remove .venv and runs; models are kept
	@rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis lib/llamalab.egg-info
	@if [ -d models ]; then echo "Kept: models/ ($$(du -sh models | cut -f1)). Remove it by hand."; fi

# The stamp holds where the environment was built and a checksum of what it was built from. It is
# taken away before an install and written after it, so that one which failed leaves none; a .venv
# without a stamp, or moved here from elsewhere, is built anew, one with an old stamp is updated.
# A conda environment that has PyTorch keeps its versions; what is missing is added in range.
setup: ## Make or update the environment; does nothing when it is current
	@set -eu; env="$(ENV)"; stamp="$$env/llamalab.stamp"; \
	place=$$(pwd -P); inputs=$$(cat pyproject.toml requirements.lock | cksum); \
	was_place=; was_inputs=; was_index=; \
	if [ -f "$$stamp" ]; then \
	  { read -r was_place; read -r was_inputs; read -r was_index || true; } < "$$stamp"; fi; \
	index="$(TORCH_INDEX)"; index="$${index:-$$was_index}"; \
	if [ "$$was_place" = "$$place" ] && "$$env/bin/python" -c "" 2>/dev/null; then \
	  if [ "$$was_inputs" = "$$inputs" ] && [ "$$was_index" = "$$index" ]; then exit 0; fi; \
	elif [ -z "$(CONDA)" ]; then \
	  python=; \
	  for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python3.14 python; do \
	    if [ -n "$$candidate" ] && "$$candidate" -c \
	      "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; \
	    then python="$$candidate"; break; \
	    elif [ -n "$$candidate" ] && [ "$$candidate" = "$(PYTHON)" ]; then \
	      echo "PYTHON=$$candidate is not a Python 3.11 or newer." >&2; exit 1; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python 3.11 or newer was found." >&2; \
	    echo "Install one from python.org or your system's packages, or say where it is:" >&2; \
	    echo "  make run PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	  if ! "$$python" -c "import ensurepip, venv" 2>/dev/null; then \
	    echo "$$python comes without its venv module, which builds the environment." >&2; \
	    echo "On Debian and Ubuntu it is in the package python3-venv." >&2; exit 1; fi; \
	fi; \
	have=; if [ -z "$${python:-}" ] && "$$env/bin/python" -c "import torch" 2>/dev/null; \
	then have=yes; fi; \
	echo "Setting up $$env (2.2 GB on the disk, more with CUDA)."; \
	echo "To download, where pip does not have it yet: 390 MB of packages, and PyTorch:"; \
	if [ "$$was_index" != "$$index" ]; then echo "  from $$index (200 MB for a CPU build)"; \
	elif [ -n "$$have" ]; then echo "  none, it is there"; \
	elif [ "$$(uname -s)" = Darwin ]; then echo "  110 MB"; \
	else \
	  echo "  2.7 GB on most Linux machines, where pip's build brings CUDA for NVIDIA GPUs."; \
	  echo "  Without such a GPU 200 MB will do: choose Linux, Pip and CPU on"; \
	  echo "  pytorch.org/get-started and give the URL that it shows after --index-url:"; \
	  echo "  make setup TORCH_INDEX=URL    (Ctrl-C stops what runs now)"; fi; \
	rm -f "$$stamp"; \
	if [ -n "$${python:-}" ]; then "$$python" -m venv --clear "$$env"; fi; \
	quiet=-qq; if [ -t 1 ]; then quiet=; fi; \
	pip() { "$$env/bin/python" -m pip --disable-pip-version-check install $$quiet "$$@"; }; \
	lock="-c requirements.lock"; \
	if [ -n "$$index" ]; then \
	  torch=$$(grep '^torch==' requirements.lock); \
	  if [ "$$was_index" != "$$index" ]; then set -- --force-reinstall; else set --; fi; \
	  pip --no-deps "$$@" --index-url "$$index" "$$torch"; \
	fi; \
	if [ -n "$(CONDA)" ] && [ -n "$$have" ]; then lock=; fi; \
	pip $$lock -e '.[test]'; \
	printf '%s\n%s\n%s\n' "$$place" "$$inputs" "$$index" > "$$stamp"; \
	echo "Ready: $$env"
