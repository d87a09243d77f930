# `make demo` and `make test` need git, Python 3.11 and make; everything else they install into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-fast lint types imports check install lock tensorrt-cpu clean

demo: $(READY)  ## the whole way on a synthetic street: runs/quickstart/report.html
	$(BIN)/hkd-quickstart --run runs/quickstart

# Each package's tests in a process of their own: whatever libraries leave behind in one, the next begins afresh.
PACKAGES := tests/hkd_deploy tests/hkd_bench tests/hkd_det tests/test_torch_free.py

test: $(READY)  ## every test
	for tests in $(PACKAGES); do $(BIN)/pytest $$tests || exit 1; done

test-fast: $(READY)  ## the tests that need no training, no engine build and no child process
	for tests in $(PACKAGES); do $(BIN)/pytest -m "not slow" $$tests || exit 1; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)  ## packages import one way, and torch stays off the device
	$(BIN)/lint-imports

check: lint types imports test  ## what CI runs

install: $(READY)

$(READY): requirements.lock pyproject.toml
	@echo "== setting up .venv: Python packages of requirements.lock, about a minute on first use"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or say make PYTHON=python3.x" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

lock: $(READY)  ## write requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--extra cpu --extra openvino --extra tensorrt --extra quant --extra train --extra cluster --extra yolo --group dev pyproject.toml -o requirements.lock

tensorrt-cpu: $(READY)  ## a real TensorRT parser and builder without a GPU, in .tensorrt/
	$(BIN)/python deploy/tensorrt_cpu.py .tensorrt

clean:
	rm -rf .venv .tensorrt runs
