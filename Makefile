# make demo | make test | make test-processors | make lint | make nightly: each sets up .venv itself
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-processors lint nightly bench-peers bench-speed bench-vfm bench-cascade bench-options \
	bench-accuracy benchmarks clean

demo: $(VENV)/.demo
	$(BIN)/anomalib-lite demo -o demo-output

test: $(VENV)/.test
	$(BIN)/python -m pytest

# The tests whose numbers depend on the processor, as other processors would run them.
test-processors: $(VENV)/.test
	tests/processors.sh $(BIN)/python

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The tests, those as other processors, and the whole comparison with anomalib: hours on two cores,
# most of them the peer's.
nightly: test test-processors bench-peers

# The coreset and the search against FAISS, anomalib (in the environment of bench-peers, made if it
# is not there) and others; benchmarks/speed/README.md has the options.
bench-speed: $(VENV)/.bench
	$(BIN)/python benchmarks/speed/run.py

# Whether it pays to adapt a foundation model; WEIGHTS names the file of a DINOv2 ViT-S/14.
bench-vfm: $(VENV)/.bench
	$(BIN)/python benchmarks/mahalanobis_vfm/run.py $(if $(WEIGHTS),--weights $(WEIGHTS))

# Whether a gate in front of a heatmap model pays; OPTIONS are those of the script, as in
# make bench-cascade OPTIONS="--hub --seeds 0"
bench-cascade: $(VENV)/.test
	$(BIN)/python benchmarks/gated_cascade/run.py $(OPTIONS)

# What each option costs and brings: hours on two cores, and it goes on where it was stopped.
bench-options: $(VENV)/.bench
	$(BIN)/python benchmarks/options/run.py $(OPTIONS)

# All studies that any machine can run; it goes on where it was stopped. docs/studies.md
benchmarks: $(VENV)/.bench
	$(BIN)/python benchmarks/run_all.py --resume --cache benchmark-output/features

# The preset "accurate" on magnetic tiles, whose directory ROOT names.
bench-accuracy: $(VENV)/.bench
	$(BIN)/python benchmarks/accuracy/magnetic_tile.py --root $(ROOT)

bench-peers: $(VENV)/.test
	$(BIN)/python benchmarks/peers/run.py

clean:
	rm -rf $(VENV) demo-output dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
