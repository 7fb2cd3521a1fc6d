# make demo | demo-distill | test | test-versions | bench [OP=name] | gpu-check | doctor | lint | clean
# Each target sets up .venv the first time, and brings it up to date when the files below change.
# PYTHON=python3.12 picks the interpreter, ARGS="..." is handed on to the command.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
GPU_OUT := $(or $(OUT),benchmarks/results)
EXTENSION := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# glibc hands freed blocks above 128 kB back to the kernel; keeping them saves a fifth of the training time.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.PHONY: demo demo-distill test test-versions bench gpu-check doctor lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.built
	@$(BIN)/chassis demo $(ARGS)

demo-distill: $(VENV)/.built
	@$(BIN)/chassis demo-distill $(ARGS)

# A process a core, each with one thread and whole test files. ARGS="-n0 -x tests/test_cli.py" runs some here and now.
test: $(VENV)/.built
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

# The ops with the oldest torch and Triton that are supported and with the newest: two environments of 5 GB.
test-versions:
	@PYTHON=$(PYTHON) .ci/versions $(ARGS)

bench: $(VENV)/.built
	@$(BIN)/python benchmarks/run.py $(if $(OP),--op $(OP:_=)) $(ARGS)

# Uses the python, torch, triton and nvcc that are there: downloads nothing, makes no .venv. PYTHON=... picks the python.
# pytest exits with 5 where no test is collected.
gpu-check:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "gpu-check: $(PYTHON) finds no CUDA device: it needs a GPU, its driver and a torch built for CUDA"; exit 1; }
	@$(PYTHON) setup.py --quiet build_ext --inplace || echo "gpu-check: the C++ kernels are not built; going on without them"
	@$(PYTHON) -c 'from chassis_kernels import backends as b; \
	  print("gpu-check: the CUDA kernels are", "built" if b._CUDA else f"not built: {b._CUDA_ERROR}")'
	@export PYTHONPATH="$(CURDIR):$(CURDIR)/python" && mkdir -p "$(GPU_OUT)" && tests=0 && \
	  { timeout 240 $(PYTHON) -m pytest -m gpu || tests=$$?; } && \
	  $(PYTHON) benchmarks/run.py --quick --minutes 4 --json --out "$(GPU_OUT)/gpu.jsonl" --plot && \
	  { [ $$tests -eq 0 ] || [ $$tests -eq 5 ] || { echo "gpu-check: the GPU tests failed"; exit 1; }; }

doctor: $(VENV)/.built
	@$(BIN)/chassis doctor $(ARGS)

lint: $(VENV)/.built
	@$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info python/*.egg-info
	rm -f chassis_kernels/_C.*.so chassis_kernels/_CUDA.*.so
	find chassis_kernels python tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is missing or older than 3.10. Install a newer Python, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv (as root)"; exit 1; }
	@echo "==> Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py constraints.txt
	@echo "==> Installing torch and the build tools"
	@$(PIP) torch "setuptools>=77" pybind11 ninja
	@echo "==> Installing chassis and what it needs, and compiling the C++ kernels"
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

# Without a working compiler this stays undone, and the next make tries again.
$(VENV)/.built: $(VENV)/.installed $(EXTENSION)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@if $(BIN)/python -c "import torch, chassis_kernels._C" 2>/dev/null; then touch $@; else \
	  echo "==> The C++ kernels are not built: everything runs on the slower reference. 'make doctor' says what is missing."; fi
