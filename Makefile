# `make demo` and `make test` need git, Python 3.10 or newer with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
# TORCH=cpu takes PyTorch's CPU-only build from its own wheel index (0.2 GB) instead of the one with CUDA (5 GB);
# TORCH=none takes none: for a login node, where jobs are submitted and results are looked at.
TORCH ?= cuda
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export PATH := $(abspath $(VENV))/bin:$(PATH)
# The environment is the project's own, and takes bytecode: without it every process compiles what it imports anew, and
# the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

READY = $(VENV)/.ready-$(TORCH)
LOCK = requirements/$(if $(filter cpu none,$(TORCH)),cpu,workstation).txt

.PHONY: demo test test-slow test-long test-container test-cluster faults mutations audit dvc lint types lock lock-image install clean
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

# As many at a time as there are cores, up to four: most of them start processes and wait for these.
test: install
	python -m pytest -m "not slow" --durations=5 --numprocesses logical --maxprocesses 4 --dist loadfile

# TESTS: some of them, by folder or file.
test-slow: install
	python -m pytest -m "slow and not long and not container and not cluster" --durations=5 $(TESTS)

test-long: install
	python -m pytest -m long --durations=5

# Needs a Docker engine that has the base image, or can fetch it.
test-container: install
	python -m pytest -m container --durations=5

# Needs a cluster of one node with Slurm and Apptainer, and the engine with the base image.
test-cluster: install
	python -m pytest -m cluster --durations=8

# Every test that tries a fault, some thousand tries, in 40 minutes; writes the README's table.
faults: install
	MOCO_TRIES=1000 python -m pytest -m "fault and not container and not cluster" --durations=10 --write-faults=README.md

# Takes safety lines out one at a time; each must make a test fail.
mutations: install
	python tests/faults/mutations.py

# Known vulnerabilities of what is installed; needs the index's own database, so that a mirror may not do.
audit: install
	for lock in workstation image; do uv tool run pip-audit --strict --no-deps --disable-pip -r requirements/$$lock.txt || exit 1; done

# What dvc.yaml lists, from the imports of each stage.
dvc: install
	python tools/dvc_yaml.py

lint: install
	ruff check .
	ruff format --check .
	lint-imports

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

# The image's: for wheels of glibc 2.17 alone, and without torch, which comes from its own index.
lock-image: install
	printf 'torch==2.6.0\ntorchvision==0.21.0\n' > build-constraints.txt
	uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_17 --only-binary :all: \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --constraint build-constraints.txt \
	  pyproject.toml -o requirements/image.txt
	rm build-constraints.txt
	awk '/^[a-z]/ {keep = $$0 !~ /^(torch|torchvision|triton|nvidia-)/} keep' requirements/image.txt > requirements/.image
	mv requirements/.image requirements/image.txt
	printf 'hypothesis>=6.100\npytest>=8\npytest-timeout>=2.3\n' | uv pip compile --quiet --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header - -o requirements/image-test.txt

# All results and records of this project; `moco clean` takes only what can be made again without loss.
clean:
	rm -rf build runs models mlartifacts mlflow.db* dvc.lock reports
