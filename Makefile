# make demo: train on real data and see what the loss saves. make test: lint, types, and the tests that find most faults,
# in five minutes on two cores. make test-all: all tests. Each needs Python 3.11 or newer, makes its own virtual
# environment and installs what it needs.
PYTHON ?= python3
DEMO_VENV ?= .venv-demo
TEST_VENV ?= .venv-test
PEERS_VENV ?= .venv-peers
# tests/oldest.txt installs the lowest versions that are supported.
CONSTRAINTS ?=

# Two thousand modules, which every process that a test starts would compile again: 6 seconds of its CPU time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo lint test test-long test-all bench report clean
.DELETE_ON_ERROR:

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python examples/train_phenotypes.py

lint: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy

test: lint
	$(PYTEST) -m "not long and not gpu and not tpu"

# What `make test` leaves out: tests that start processes, compile for pods, or interpret large arrays.
test-long: $(TEST_VENV)/ready
	$(PYTEST) -m "long and not gpu and not tpu"

test-all: lint
	$(PYTEST)

PYTEST = $(TEST_VENV)/bin/python -m pytest -q tests

bench: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/python -m profiling bounds

# The README's tables and pictures with this machine's figures, against torch and timm too. 8 GB with PyPI's torch.
report: $(PEERS_VENV)/ready
	$(PEERS_VENV)/bin/python -m profiling report
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PEERS_VENV)/bin/python -m profiling report --quick --target local

$(DEMO_VENV)/ready: pyproject.toml
	$(call make_venv,$(DEMO_VENV))
	$(DEMO_VENV)/bin/pip install -q -e ".[demo]"
	touch $@

$(TEST_VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(call make_venv,$(TEST_VENV))
	$(call install,$(TEST_VENV),test)
	touch $@

$(PEERS_VENV)/ready: pyproject.toml
	$(call make_venv,$(PEERS_VENV))
	$(call install,$(PEERS_VENV),test$(comma)peers)
	touch $@

comma := ,

# The CUDA plugin has to have jax's own version; no card and no driver are needed to compile with it.
define install
@echo "$(1)/bin/pip install -e .[$(2)]"
@$(1)/bin/pip install -q --no-compile $(addprefix -c ,$(CONSTRAINTS)) -e ".[$(2)]"
@version=$$($(1)/bin/python -c "import jax; print(jax.__version__)"); \
	$(1)/bin/pip install -q --no-compile jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
endef

define make_venv
@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	{ echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); asl_pallas needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
@rm -rf $(1)
@$(PYTHON) -m venv $(1) || { echo "On Debian: apt install python3-venv"; exit 1; }
endef

clean:
	rm -rf .venv-* build dist *.egg-info examples/output
