# `make demo` and `make test` need git, Python 3.10 or newer with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
# TORCH=cpu takes PyTorch's CPU-only build from its own wheel index (0.2 GB) instead of the one with CUDA (5 GB).
TORCH ?= cuda
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

READY = $(VENV)/.ready-$(TORCH)
LOCK = requirements/$(if $(filter cpu,$(TORCH)),cpu,workstation).txt

.PHONY: demo test test-slow lint types lock install clean
install: $(READY)

$(READY): requirements/uv.txt $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --require-hashes -r $(LOCK)
ifeq ($(TORCH),cpu)
	grep -E '^(torch|torchvision)==' requirements/workstation.txt | tr -d '\\' | \
	  $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --index-url $(TORCH_CPU_INDEX) -r -
endif
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.ready-*
	touch $@

demo: install
	dvc repro
	moco report

test: install
	python -m pytest -m "not slow" --durations=5

test-slow: install
	python -m pytest -m slow --durations=5

lint: install
	ruff check .
	ruff format --check .

types: install
	mypy

# Names, versions and hashes alone; the index is whatever this machine is set up for.
COMPILE = uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-emit-index-url \
  --no-annotate --no-header
lock: install
	$(COMPILE) --extra dev pyproject.toml -o requirements/workstation.txt
	echo uv | $(COMPILE) - -o requirements/uv.txt
	awk '/^[a-z]/ {keep = $$0 !~ /^(torch|torchvision|triton|nvidia-|cuda-)/} keep' requirements/workstation.txt \
	  > requirements/cpu.txt

clean:
	rm -rf build runs models mlartifacts mlflow.db* dvc.lock reports
