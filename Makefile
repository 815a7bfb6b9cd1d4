# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-cuda lint mutants clean

.venv/ready: pyproject.toml constraints.txt setup.py $(wildcard collectives/native/* qtp/kernels/native/*)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready
	.venv/bin/torchrun --standalone --nproc-per-node 2 -m qtp.run_pa --model qtp/demo/dense --tp 2 --max_batch_size 2 --max_output_length 48 \
	    --input_texts "def mean(data):" "class Path:"

# One more at a time than CI has cores: much of it waits. Files in their order: small ones come last.
test: .venv/ready
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# On a machine with a card, by the Python whose torch knows it (PYTHON=...); nothing of this project need be installed there.
test-cuda:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest --device cuda -n 4 -rf \
	    $$(PYTHONPATH=tests $(PYTHON) -c "import device_helper; print(*device_helper.ON_DEVICE)")

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

mutants: .venv/ready
	$(PY) scripts/mutants.py --only "$(ONLY)"

clean:
	rm -rf .venv build *.egg-info collectives/*.so qtp/kernels/*.so
