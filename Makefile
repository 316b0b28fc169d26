# `make demo` and `make test` need Python >= 3.10, a C++ compiler and make; everything else they install into .venv.

PYTHON ?= python3
# The version that is tested; tutelx runs with any torch from 2.10 on: make TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
# Libraries that are integrated with; the tests of those that are missing are skipped.
PEERS := "transformers==5.23.0; python_version >= '3.11'" "peft==0.21.2" "accelerate==1.15.0" "tensorboard==2.21.0"
# Those that ask for another torch, or for more than their layers need, are installed alone, with what they import.
ALONE := lightning==2.6.6 pytorch-lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 einops==0.8.2 \
  st-moe-pytorch==0.1.8 mixture-of-experts==0.2.3 colt5-attention==0.11.2 local-attention==1.11.2 \
  hyper-connections==0.4.11 beartype==0.23.1 fairscale==0.4.13 torchscale==0.3.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
export PYTHONUNBUFFERED := 1

.PHONY: install demo bench test test-all gpu-check link-check lint format clean
install: $(VENV)/.built

demo: install
	$(BIN)/tutelx demo

bench: install
	$(BIN)/tutelx bench

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.test
	$(BIN)/python -m pytest

# On a machine with a GPU, in the Python that is there (torch with CUDA, nvcc, pytest); downloads nothing.
# STAGE="build tests sanitizer bench": some of them. OPS="encode decode": benchmarks. RESULTS=folder of the record.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(STAGE) $(if $(RESULTS),--results $(RESULTS)) $(if $(OPS),--ops $(OPS))

# Compiles, links and loads the CUDA extension against torch's CUDA wheels, about 5 GB to download. Needs nvcc, no GPU.
LINK := build/link-check
CUDA_TORCH ?= torch==2.11.0
link-check: $(LINK)/.torch
	TUTELX_CUDA=1 $(LINK)/venv/bin/python setup.py -q build_ext --build-lib $(LINK)/lib --build-temp $(LINK)/temp
	$(LINK)/venv/bin/python -c 'import torch; torch.ops.load_library("$(LINK)/lib/tutelx/_C.so"); \
	  assert torch._C._dispatch_has_kernel_for_dispatch_key("tutelx::encode", "CUDA"); print("loads in torch", torch.__version__)'

$(LINK)/.torch:
	$(PYTHON) -m venv $(LINK)/venv
	$(LINK)/venv/bin/python -m pip install -q --disable-pip-version-check "$(CUDA_TORCH)" numpy "setuptools>=64" ninja
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

clean:
	rm -rf $(VENV) build *.egg-info tutelx/*.so

# Each step leaves a stamp, so that a second `make` does nothing twice.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "tutelx needs Python >= 3.10, $(PYTHON) is %d.%d; try make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV)
	$(PIP) install --upgrade pip "setuptools>=64" wheel ninja numpy pybind11
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*)
	@echo "compiling the C++ extension (some minutes on two cores)"
	$(PIP) install --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(VENV)/.built
	$(PIP) install "pytest>=8" "hypothesis>=6" "safetensors>=0.4" $(PEERS) "$(TORCH)"
	$(PIP) install --no-deps $(ALONE) || echo "their tests are skipped"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(PIP) install ruff==0.14.5 mypy==1.18.2 clang-format==21.1.5 "pre-commit>=4"
	@touch $@
