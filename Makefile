# Two commands, each doing all of its own set-up: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow peft-suite speed-check test-lowest fuzz audit sbom lint docs figures venv wheel clean

venv: $(STAMP)

# torch and torchvision (for timm) are resolved together, so that they belong to the same build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("structlora_pyg needs Python 3.10 or newer; set PYTHON=python3.11") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/structlora demo

test: $(STAMP)
	$(BIN)/python -m pytest

# What make test leaves out: several processes, clusters of one machine, real data, every convolution, the browser.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --dist worksteal

# The same tests on the lowest supported versions, in an environment of their own.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[study]' pytest pytest-xdist hypothesis tabulate
	$(VENV)-lowest/bin/python -m pytest

# PEFT's own tests on our models, every twelfth case.
peft-suite: $(STAMP)
	$(BIN)/python benchmarks/peft_suite.py --active --check --every 12

# Has a training step become slower, as a ratio to stock PEFT LoRA?
speed-check: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py --check

# Thousands of damaged files through every loader.
fuzz: $(STAMP)
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-1000} $(BIN)/python -m pytest tests/study/test_fuzz.py

# Known vulnerabilities of the pinned set, and a bill of materials; both tools live in an environment of their own.
audit sbom: $(STAMP)
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit cyclonedx-bom
	test $@ = sbom || $(VENV)-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip
	test $@ = audit || $(VENV)-audit/bin/cyclonedx-py environment $(BIN)/python -o sbom.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/docs; warnings are errors.
docs: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

# The pictures of runs in the documents, of the current defaults; some minutes.
figures: $(STAMP)
	rm -rf runs/demo runs/look
	$(BIN)/structlora demo
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1180,780 \
	  --screenshot=docs/figures/report.png $(CURDIR)/runs/demo/report.html
	$(BIN)/structlora train --config digits train.max_steps=60 train.output_dir=runs/look train.record_every=5 train.watch_every=5 adapter.coordinator.conv=GATv2Conv adapter.coordinator.num_layers=2
	$(BIN)/structlora look runs/look
	cp $(foreach name,graph attention structure dirichlet,runs/look/figures/look-$(name).svg) docs/figures

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-audit sbom.json dist build runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
