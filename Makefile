# Targets install what they need into .venv. Requirements: git, make, Python 3.10 to 3.13.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
# One process per package: OpenVINO can crash in a process in which torch has trained before.
PACKAGES := tests/hkd_deploy tests/hkd_bench tests/hkd_det

.PHONY: help demo test test-fast test-docs lint types imports docs docs-reference check install lock tensorrt-cpu gpu-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(READY)  ## train, distill, export and measure on a synthetic dataset: runs/quickstart/report.html
	$(BIN)/hkd-quickstart --save-dir runs/quickstart

test: test-fast  ## run all tests
	for tests in "$(wildcard tests/test_*.py)" $(PACKAGES); do \
	  OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not documentation" -n 2 $$tests || exit 1; \
	done

test-fast: $(READY)  ## run all tests but the slow ones (less than 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not documentation" -n 2 --dist loadfile tests

test-docs: $(READY)  ## run the commands of the README and the examples (about 6 minutes)
	$(BIN)/pytest -m documentation tests/test_documentation.py

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

imports: $(READY)  ## import directions between packages, no torch on the device
	$(BIN)/lint-imports

docs: $(READY)  ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-reference: $(READY)  ## write the command and method reference
	$(BIN)/python docs/generate_reference.py

check: lint types imports docs test  ## what CI runs

install: $(READY)  ## create .venv with the locked packages

$(READY): requirements.lock pyproject.toml
	@echo "== installing the packages of requirements.lock into .venv (about a minute)"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found. Install it, or run make PYTHON=python3.x" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

lock: $(READY)  ## write requirements.lock and deploy/desktop/cpu.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
		--extra cpu --extra openvino --extra tensorrt --extra bench --extra nvml --extra loadgen --extra heic --extra live --extra track --extra mqtt --extra metrics --extra web --extra quant --extra train --extra cluster --extra yolo \
		--group dev --group docs pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --constraint requirements.lock \
		--extra cpu --extra bench --extra live --extra track --extra mqtt --extra metrics --extra web pyproject.toml -o deploy/desktop/cpu.lock

tensorrt-cpu: $(READY)  ## install TensorRT's parser and builder for machines without a GPU into .tensorrt/
	$(BIN)/python deploy/tensorrt_cpu.py .tensorrt

# Another Python, such as that of a container with TensorRT: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(READY))  ## check training, CUDA and TensorRT on a machine with an NVIDIA GPU (less than 10 minutes)
	PYTHONPATH="$(CURDIR):$(CURDIR)/deploy:$(CURDIR)/benchmarks" $(GPU_PYTHON) benchmarks/studies/gpu_check.py --output runs/gpu_check

clean:  ## remove everything that make creates
	rm -rf .venv .tensorrt runs site
