# Each target is a command that you could type; the first one also makes the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-oldest test-bare lint docs bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[app,dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/convfusion demo --out out

test: $(VENV)/.installed
	$(BIN)/pytest

# The oldest libraries that pyproject.toml allows: a name in constraints-oldest.txt replaces its line
# in constraints.txt. The tests are those that lean on these libraries most, marked `libraries`.
OLDEST := .venv-oldest

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	awk -F== 'NR == FNR {old[$$1]} NR == FNR || !($$1 in old)' constraints-oldest.txt \
		constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check \
		-c $(OLDEST)/constraints.txt -e ".[dev]"
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -m libraries

# Without any of the extras: every command works, or says which extra it needs.
BARE := .venv-bare

$(BARE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		hypothesis pytest pytest-xdist
	touch $@

test-bare: $(BARE)/.installed
	$(BARE)/bin/pytest tests/test_extras.py tests/test_mixers.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=src:integrations $(BIN)/mypy -p comfyui

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Half an hour on two cores that have nothing else to do; the last line takes half of it.
LATENCY := $(BIN)/convfusion bench latency sd15 --out results/latency.csv
SIZES := $(foreach side,256 512 1024 2048 4096,--size $(side)x$(side))
bench: $(VENV)/.installed
	$(BIN)/python recipes/layouts.py
	$(LATENCY) $(SIZES) --limit 12
	$(LATENCY) --backward --size 512x512 --mixers delta_conv,linfusion
	$(LATENCY) --whole --mixers delta_conv,linfusion,removed --size 512x512 --rounds 2
	$(LATENCY) --whole --mixers delta_conv,removed --size 1024x1024 --rounds 2
	$(LATENCY) --whole --mixers delta_conv --size 2048x2048 --batch 1 --rounds 1 --no-warm-up
	$(BIN)/python recipes/tables.py

clean:
	rm -rf $(VENV) $(OLDEST) $(BARE) out build dist site
