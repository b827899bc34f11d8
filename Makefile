# Everything below works on a bare machine with Python 3.10 or newer; .venv is made on demand.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OLDEST := $(VENV)-oldest/bin/python
# Side by side, a file in one process, which keeps what its tests share; tests/conftest.py orders them.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
OUTPUT := runs/demo
VIDEOS := runs/demo-videos
# Whose tests are run with the oldest torch and Triton, too.
OPERATORS := attention attention_backward attention_extremes attention_windows cuda_rows \
	cyclic_shift patch_merging residual_norm window_partition
# Of threads and blocks, in which the emulated CUDA C++ kernels are asked once more.
ORDERS := backward newest random:1

.PHONY: demo test verify oldest orders mutants lint clean libraries

demo: $(VENV)/.demo libraries
	$(RUN) -m train.synthetic $(VIDEOS)
	$(RUN) -m train --recipe demo --output $(OUTPUT) --resume
	$(RUN) -m train.evaluate --checkpoint $(OUTPUT)/last.pt --frame-orders
	$(RUN) -m train.predict $(VIDEOS)/test/clockwise/00000.mp4 --checkpoint $(OUTPUT)/last.pt \
		--sheet $(OUTPUT)/sheets
	$(RUN) -m train.speed --recipe demo

test: $(VENV)/.test libraries
	$(RUN) -m pytest $(SPREAD) -m "not slow"

# Here the mistakes need no control of their own: all tests run without any.
verify: MUTANTS := --without-control
verify: $(VENV)/.test libraries oldest orders mutants
	$(RUN) -m pytest $(SPREAD)

# The libraries are those of the newest torch: one file is for every torch.
oldest: $(VENV)-oldest/.made libraries
	$(OLDEST) -m pytest $(SPREAD) -m "not slow" $(patsubst %,tests/test_%.py,$(OPERATORS))
	$(OLDEST) -m pytest -n auto --maxprocesses 4 tests/test_triton_compiles.py -k common_model

orders: $(VENV)/.test libraries
	@[ -e videoswin_kernels/_C.so ] || echo "The emulator is not built: no other orders of threads."
	@[ ! -e videoswin_kernels/_C.so ] || for order in $(ORDERS); do \
		$(RUN) -m pytest $(SPREAD) -m "not slow" -k cuda-cpu --emulated-order=$$order \
			$(patsubst %,tests/test_%.py,$(OPERATORS)) || exit; \
	done

mutants: $(VENV)/.test
	$(RUN) tests/mutations/run.py $(MUTANTS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

# Where a tool is missing (status 3) its tests are skipped; what cannot be compiled is an error.
libraries: $(VENV)/.demo
	@$(RUN) setup.py build_ext || \
		{ [ $$? -eq 3 ] && echo "The C++ libraries are not built; their tests are skipped."; }

clean:
	rm -rf $(VENV) $(VENV)-oldest $(OUTPUT) $(VIDEOS) build dist *.egg-info .pytest_cache .ruff_cache
	rm -f videoswin_kernels/*.so
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
