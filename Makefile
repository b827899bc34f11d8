# Everything below works on a bare machine with Python 3.10 or newer; .venv is made on demand.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OLDEST := $(VENV)-oldest/bin/python
# Side by side, a file in one process, which keeps what its tests share.
SPREAD := -n auto --maxprocesses 4 --dist loadfile
OUTPUT := runs/demo
VIDEOS := runs/demo-videos
# Whose tests are run with the oldest torch and Triton, too.
OPERATORS := attention attention_backward attention_extremes attention_windows cyclic_shift \
	patch_merging residual_norm window_partition

.PHONY: demo test verify oldest mutants lint clean

demo: $(VENV)/.demo
	$(RUN) -m train.synthetic $(VIDEOS)
	$(RUN) -m train --recipe demo --output $(OUTPUT) --resume
	$(RUN) -m train.evaluate --checkpoint $(OUTPUT)/last.pt --frame-orders
	$(RUN) -m train.predict $(VIDEOS)/test/clockwise/00000.mp4 --checkpoint $(OUTPUT)/last.pt

test: $(VENV)/.test
	$(RUN) -m pytest $(SPREAD) -m "not slow"

verify: $(VENV)/.test oldest mutants
	$(RUN) -m pytest $(SPREAD)

oldest: $(VENV)-oldest/.made
	$(OLDEST) -m pytest $(SPREAD) -m "not slow" $(patsubst %,tests/test_%.py,$(OPERATORS))
	$(OLDEST) -m pytest -n auto --maxprocesses 4 tests/test_triton_compiles.py -k common_model

mutants: $(VENV)/.test
	$(RUN) tests/mutations/run.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(OUTPUT) $(VIDEOS) build dist *.egg-info .pytest_cache .ruff_cache
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

$(VENV)-oldest/.made: requirements-oldest.txt $(VENV)/.made
	@$(PYTHON) -m venv $(VENV)-oldest || { rm -rf $(VENV)-oldest; exit 1; }
	$(OLDEST) -m pip install --quiet -r requirements-oldest.txt
	touch $@
