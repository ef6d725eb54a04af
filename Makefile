# Each target makes .venv and installs what it needs on a machine that has only Python (>= 3.11) and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo federation benchmark-latent-drift benchmark-counterfactuals benchmark-privacy benchmark-deployment benchmark-bases benchmark-gpu benchmark-stable-diffusion-cost benchmark-burned-in-text benchmark-scans benchmark-security benchmark-individual benchmark-network benchmark-real benchmark-real-latents benchmark-seen benchmark-performance benchmark-house dist test test-all check install clean

install: .venv/.installed

# constraints.txt is the tested set of versions; pyproject.toml has the ranges that others install.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.*"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/ld-simulate --config configs/demo.yaml

federation: install
	FLWR_HOME=$(CURDIR)/runs/flower FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
	FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(BIN)/flwr run . --stream --federation-config "num-supernodes=3"

benchmark-latent-drift: install
	$(BIN)/ld-benchmark latent-drift

benchmark-counterfactuals: install
	$(BIN)/ld-benchmark counterfactuals

benchmark-privacy: install
	$(BIN)/ld-benchmark privacy

benchmark-deployment: install
	$(BIN)/ld-benchmark deployment

benchmark-bases: install
	$(BIN)/ld-benchmark bases

benchmark-gpu: install
	$(BIN)/ld-benchmark gpu

benchmark-stable-diffusion-cost: install
	$(BIN)/ld-benchmark stable-diffusion-cost

benchmark-burned-in-text: install
	$(BIN)/ld-benchmark burned-in-text

benchmark-scans: install
	$(BIN)/ld-benchmark scans

benchmark-house: install
	$(BIN)/ld-benchmark house

benchmark-security: install
	$(BIN)/ld-benchmark security

benchmark-individual: install
	$(BIN)/ld-benchmark individual

benchmark-network: install
	$(BIN)/ld-benchmark network

benchmark-seen: install
	$(BIN)/ld-benchmark seen

benchmark-federation: install
	$(BIN)/ld-benchmark federation

# After make demo, whose seconds it takes from runs/demo.
benchmark-performance: install
	$(BIN)/ld-benchmark performance

# Images that are not part of the project; skipped where DATA is absent.
DATA ?= ../shared/data
benchmark-real: install
	$(BIN)/ld-benchmark real data=$(DATA)

benchmark-real-latents: install
	$(BIN)/ld-benchmark real-latents data=$(DATA)

dist: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist ./client
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist ./server
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build client/build server/build

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# `worksteal` gives idle workers the tests that are left. Both targets leave their seconds in runs/ for benchmark-house.
PYTEST = $(BIN)/pytest --numprocesses $$(nproc) --dist worksteal
TIMED = mkdir -p runs && started=$$(date +%s) && $(1) && echo $$(( $$(date +%s) - started )) > runs/$(2)_seconds

test: install
	$(call TIMED,$(PYTEST) -m "not slow",make_test)

test-all: install
	$(call TIMED,$(PYTEST),make_test_all)

.PHONY: docs

# The generated pages, then the site, offline, into runs/site.
docs: install
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf runs build dist
