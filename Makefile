# Each target makes .venv and installs what it needs on a machine that has only Python (>= 3.11) and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo federation dist test check install clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.*"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/ld-simulate --config configs/demo.yaml

federation: install
	FLWR_HOME=$(CURDIR)/runs/flower FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
	FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(BIN)/flwr run . --stream --federation-config "num-supernodes=3"

BENCHMARKS := latent-drift counterfactuals privacy deployment stable-diffusion-cost house

.PHONY: $(BENCHMARKS:%=benchmark-%)
$(BENCHMARKS:%=benchmark-%): benchmark-%: install
	$(BIN)/ld-benchmark $*

dist: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist ./client
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build client/build

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One worker more than there are processors: the longest tests mostly wait for processes of their own.
test: install
	$(BIN)/pytest --numprocesses $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf runs build dist
