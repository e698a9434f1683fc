# Every target sets up its own environment first (.venv, see tools/setup_env.py).
PYTHON ?= python3
JOBS ?= 2
GPU_JOBS ?= 16
TRITON ?= 3.9.0
TORCH ?= 2.11.0

RUN := .venv/bin/python
NOT_HERE := not gpu and not slow
# SEED=n repeats the random inputs of a run; without it they are fresh
SEEDED := $(if $(SEED),--seed $(SEED) --hypothesis-seed $(SEED))

# Only a GPU machine that borrows its packages and has no network can lack linters or have too new a numpy.
if-installed = if $(RUN) -c "import $(1)" 2>/dev/null; then $(2); else echo "skipped, $(1) is not installed: $(2)"; fi
numpy-suits-interpreter := $(RUN) -c "import numpy; exit(int(numpy.__version__.split('.')[1]) >= 4)"
lint-with = $(call if-installed,ruff,$(RUN) -m ruff $(1))

.PHONY: test test-interpreter test-rest test-triton test-torch test-gpu demo demo-serve bench lint typecheck wheel format setup setup-clients clean

# One at a time and in this order, so that the last line is pytest's summary.
.NOTPARALLEL:
test: setup-clients lint typecheck wheel test-interpreter test-rest

test-interpreter: setup-clients
	@if ! $(numpy-suits-interpreter); then echo "skipped, Triton's interpreter needs numpy below 2.4"; else \
	TRITON_INTERPRET=1 $(RUN) -m pytest -q -n $(JOBS) --dist worksteal $(SEEDED) -m "interpreter and $(NOT_HERE)" tests; fi

test-rest: setup-clients
	env -u TRITON_INTERPRET $(RUN) -m pytest -q -n $(JOBS) --dist worksteal $(SEEDED) -m "not interpreter and $(NOT_HERE)" tests

# The compile checks with another release of Triton than the one that torch brought.
test-triton: setup
	$(RUN) -m pip install -q --no-deps --upgrade --target .venv.triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=.venv.triton-$(TRITON) $(RUN) -m pytest -q -n $(JOBS) tests/compile

# The tests that need no GPU with another release of torch, in an environment of their own.
test-torch:
	$(PYTHON) -m venv .venv.torch-$(TORCH)
	.venv.torch-$(TORCH)/bin/python -m pip install -q -c constraints/python.txt \
		torch==$(TORCH) einops numpy pytest pytest-xdist hypothesis
	env -u TRITON_INTERPRET .venv.torch-$(TORCH)/bin/python -m pytest -q -n $(JOBS) --dist worksteal \
		-m "not interpreter and $(NOT_HERE)" --ignore tests/compile tests

test-gpu: setup-clients
	env -u TRITON_INTERPRET $(RUN) -m pytest -q -n $(GPU_JOBS) --dist worksteal -m "gpu and not slow" tests

demo: setup
	$(RUN) examples/train_gpt.py

demo-serve: setup
	$(RUN) examples/serve_gpt.py

bench: setup
	$(RUN) -m benchmarks.run

lint: setup
	@$(call lint-with,check .)
	@$(call lint-with,format --check .)

typecheck: setup-clients
	@$(call if-installed,mypy,$(RUN) -m mypy)

wheel: setup
	$(RUN) tools/check_wheel.py

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

setup:
	@$(PYTHON) tools/setup_env.py

setup-clients:
	@$(PYTHON) tools/setup_env.py --clients

clean:
	rm -rf .venv .venv.triton-* .venv.torch-* build dist demo *.egg-info
