# Everything runs in .venv, which is made on first use and refreshed when pyproject.toml or constraints.txt change.
# The install is editable: a change of the source needs no reinstall. The benchmark's rivals have .venv-bench.

PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
INSTALLED = .venv/.installed
BENCH_PIP = .venv-bench/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
BENCH_INSTALLED = .venv-bench/.installed
BENCH = .venv-bench/bin/python -m

.PHONY: help demo test test-long check bench bench-growth bench-floors format clean

help:
	@echo "make demo        find 10% planted label errors in the digits; writes demo-report/report.html"
	@echo "make test        the tests, without those marked long"
	@echo "make test-long   the tests marked long"
	@echo "make check       lint, formatting and types"
	@echo "make bench       measure against every rival (about 50 minutes on a quiet machine; a rerun goes on where"
	@echo "                 it was stopped); QUICK=1 tries it on one small model; ARGS=\"--only cnn --fresh\" chooses"
	@echo "make bench-growth   how steps grow with sizes (under 10 minutes)"
	@echo "make bench-floors   what a step costs at least, and where the rest of ours goes (a few minutes)"
	@echo "make format      repair what the linter and the formatter can"
	@echo "make clean       remove .venv, caches and the demo's report"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into .venv (takes a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) hatchling
	$(PIP_INSTALL) --no-build-isolation --editable '.[app,dev]'
	@touch $@

# The tests run in two workers of one thread each; products as small as the demo's are slower on more threads.
test test-long demo: export OMP_NUM_THREADS = 1

demo: $(INSTALLED)
	.venv/bin/rowgrad audit digits --flip 0.1 --out demo-report

test: $(INSTALLED)
	.venv/bin/python -m pytest -m "not long" -n 2 --dist worksteal

test-long: $(INSTALLED)
	.venv/bin/python -m pytest -m long -n 2 --dist worksteal

check: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --pythonpath .venv/bin/python

$(BENCH_INSTALLED): benchmarks/requirements.txt benchmarks/requirements-alone.txt pyproject.toml constraints.txt
	@echo "Installing the rivals into .venv-bench (takes a few minutes the first time)"
	$(PYTHON) -m venv .venv-bench
	$(BENCH_PIP) hatchling
	$(BENCH_PIP) --no-build-isolation --editable '.[app]' --requirement benchmarks/requirements.txt
	$(BENCH_PIP) --no-deps --requirement benchmarks/requirements-alone.txt
	@touch $@

ifdef QUICK
bench: $(BENCH_INSTALLED)
	$(BENCH) benchmarks.runner --only mlp-32 --tiny --seconds 1 --fresh --file bench-quick/cpu.json
	$(BENCH) benchmarks.page --folder bench-quick
else
bench: $(BENCH_INSTALLED)
	$(BENCH) benchmarks.runner $(ARGS)
	$(BENCH) benchmarks.page
endif

bench-growth: $(BENCH_INSTALLED)
	$(BENCH) benchmarks.sweep $(ARGS)
	$(BENCH) benchmarks.growth $(ARGS)
	$(BENCH) benchmarks.paths $(ARGS)
	$(BENCH) benchmarks.page

bench-floors: $(BENCH_INSTALLED)
	$(BENCH) benchmarks.floors $(ARGS)
	$(BENCH) benchmarks.page

format: $(INSTALLED)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf .venv .venv-bench demo-report bench-quick dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
