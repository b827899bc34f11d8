# Everything below works on a bare machine with Python 3.10 or newer; .venv is made on demand.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUTPUT := runs/demo
VIDEOS := runs/demo-videos

.PHONY: demo test verify mutants lint clean

demo: $(VENV)/.demo
	$(RUN) -m train.synthetic $(VIDEOS)
	$(RUN) -m train --recipe demo --output $(OUTPUT) --resume
	$(RUN) -m train.evaluate --checkpoint $(OUTPUT)/last.pt --frame-orders
	$(RUN) -m train.predict $(VIDEOS)/test/clockwise/00000.mp4 --checkpoint $(OUTPUT)/last.pt

test: $(VENV)/.test
	$(RUN) -m pytest -m "not slow"

verify: $(VENV)/.test mutants
	$(RUN) -m pytest

mutants: $(VENV)/.test
	$(RUN) tests/mutations/run.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) $(OUTPUT) $(VIDEOS) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older; make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "Python's venv failed; on Debian: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.demo: requirements.txt | $(VENV)/.made
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.test: requirements-test.txt requirements.txt | $(VENV)/.made
	$(RUN) -m pip install --quiet -r requirements-test.txt
	touch $@ $(VENV)/.demo
