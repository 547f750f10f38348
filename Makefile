# Everything runs in .venv, which is made on first use and refreshed when pyproject.toml or constraints.txt change.
# The install is editable: a change of the source needs no reinstall.

PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
INSTALLED = .venv/.installed

.PHONY: help demo test test-long check format clean

help:
	@echo "make demo        find 10% planted label errors in the digits; writes demo-report/report.html"
	@echo "make test        the tests, without those marked long"
	@echo "make test-long   the tests marked long"
	@echo "make check       lint, formatting and types"
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

format: $(INSTALLED)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf .venv demo-report dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
