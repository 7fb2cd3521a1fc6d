# make demo | test | bench [OP=name] | doctor | lint | clean
# Each target sets up .venv the first time, and brings it up to date when the files below change.
# PYTHON=python3.12 picks the interpreter, ARGS="..." is handed on to the command.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
BENCHMARKS = $(if $(OP),benchmarks/bench_$(OP:_=).py,$(wildcard benchmarks/bench_*.py))
EXTENSION := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# glibc hands freed blocks above 128 kB back to the kernel; keeping them saves a fifth of the training time.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.PHONY: demo test bench doctor lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.built
	@$(BIN)/chassis demo $(ARGS)

test: $(VENV)/.built
	@$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.built
	@$(BIN)/python -m pytest $(BENCHMARKS) --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

doctor: $(VENV)/.built
	@$(BIN)/chassis doctor $(ARGS)

lint: $(VENV)/.built
	@$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info python/*.egg-info
	rm -f chassis_kernels/_C*.so
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
