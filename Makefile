# Targets for people; everything they do is a command that you can also type.
EXPERIMENT ?= smoke
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
# Where bytecode is not kept, as in many container images, each interpreter would compile every library anew.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX = $(CURDIR)/.cache/bytecode

.PHONY: help reproduce plan paper verify pack unpack wandb-sync docs test lint lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14
	@echo
	@echo "EXPERIMENT=NAME picks a file of conf/experiment (now: $(EXPERIMENT)); ARGS='a=b c=d' adds settings."

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: $(PYTHON) is Python %d.%d, and 3.11 or later is needed: make PYTHON=python3.11 …" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@# Nothing imports most of 20,000 modules, and compiling them all would take as long as the rest.
	$(BIN)/pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

reproduce: .venv/installed ## run EXPERIMENT (what is missing of it), then what `make paper` makes
	$(BIN)/python experiments/reproduce.py experiment=$(EXPERIMENT) $(ARGS)

plan: .venv/installed ## print the runs of EXPERIMENT and how many are finished; changes nothing
	@$(BIN)/python experiments/train.py experiment=$(EXPERIMENT) launcher.plan=true $(ARGS)

paper: .venv/installed ## tables, figures, model card and report from the runs that are there
	$(BIN)/python experiments/paper.py experiment=$(EXPERIMENT) $(ARGS)

verify: .venv/installed ## whether the tables are what the runs say, and a run gives its weights again (ARGS='--rerun 3')
	@$(BIN)/python experiments/verify.py experiment=$(EXPERIMENT) $(ARGS)

pack: .venv/installed ## keep the runs' records (no weights) in one file to commit, results/records/EXPERIMENT.zip
	@$(BIN)/python experiments/records.py pack experiment=$(EXPERIMENT) $(ARGS)

unpack: .venv/installed ## run folders from that file, where they are missing: the tables can be made and gone on with
	@$(BIN)/python experiments/records.py unpack experiment=$(EXPERIMENT) $(ARGS)

wandb-sync: .venv/installed ## upload the runs of EXPERIMENT to W&B from their files; each once, unchanged ones not again
	@$(BIN)/python experiments/export_wandb.py --mode online experiment=$(EXPERIMENT) $(ARGS)

docs: .venv/installed ## the site, into site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: .venv/installed ## all tests; ARGS='-m "not slow"' for those of methods, training and data alone
	$(BIN)/python -m pytest -n 4 --dist worksteal --durations=10 $(ARGS)

lint: .venv/installed ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock: ## renew requirements.lock from pyproject.toml
	rm -rf .venv && $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --editable '.[test]' && \
	(echo "# Exact versions of everything that pip installs here (Python 3.11); make lock renews it."; \
	 $(BIN)/pip freeze --exclude-editable --all | sed 's/+cpu//' | grep -viE '^(pip|wheel)==') > requirements.lock

clean: ## remove the environment and caches; runs and tables stay
	rm -rf .venv .cache site .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build
