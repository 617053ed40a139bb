# make demo | make test | make test-processors | make lint | make nightly: each sets up .venv itself
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# anomalib, in an environment of its own.
PEER := benchmarks/peers/.venv-anomalib

.PHONY: demo test test-processors lint nightly benchmarks bench-quick bench-peers bench-speed \
	bench-accuracy clean

demo: $(VENV)/.demo
	$(BIN)/anomalib-lite demo -o demo-output

# A process a core, of one thread each. With one thread OpenVINO can hang where a compiled model of the
# tests of the engines is given up, so these run by themselves, with all threads.
ENGINES := tests/test_engines.py
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --ignore $(ENGINES)
	$(BIN)/python -m pytest $(ENGINES)

# The tests whose numbers depend on the processor, as other processors would run them.
test-processors: $(VENV)/.test
	tests/processors.sh $(BIN)/python

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# All tests, also those marked nightly (whole benchmarks on miniatures, real photographs), those as
# other processors, and the whole comparison with anomalib: hours on two cores, most of them the peer's.
nightly: test test-processors bench-peers
	$(BIN)/python -m pytest -m nightly

# The coreset and the search against FAISS, anomalib (in the environment of bench-peers, made if it
# is not there) and others; benchmarks/speed/README.md has the options.
bench-speed: $(VENV)/.bench
	$(BIN)/python benchmarks/speed/run.py

# All studies that any machine can run; it goes on where it was stopped. docs/studies.md; OPTIONS are
# those of anomalib-lite benchmark, as in make benchmarks OPTIONS="--seeds 0".
benchmarks: $(VENV)/.bench $(PEER)
	$(BIN)/python benchmarks/run_all.py --resume --cache benchmark-output/features $(OPTIONS)

# Few images and one seed: do all of them work?
bench-quick: $(VENV)/.bench $(PEER)
	rm -rf benchmark-quick
	$(BIN)/python benchmarks/run_all.py --quick --output benchmark-quick $(OPTIONS)

# The preset "accurate" on magnetic tiles, whose directory ROOT names.
bench-accuracy: $(VENV)/.bench
	$(BIN)/python benchmarks/accuracy/magnetic_tile.py --root $(ROOT)

$(PEER): $(VENV)/.bench benchmarks/peers/requirements-anomalib.txt
	$(BIN)/python benchmarks/peers/surroundings.py
	@touch $@

bench-peers: $(VENV)/.test
	$(BIN)/python benchmarks/peers/run.py

clean:
	rm -rf $(VENV) demo-output benchmark-quick dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
