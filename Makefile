# Two commands on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
OUT    ?= out/demo

.PHONY: demo test test-unit test-containers lint format matrix clean setup

demo: $(VENV)/.installed
	$(PY) -m ci run 'vllm-0.32.0/plugin/cpu/smollm2-135m' --profile demo --out $(OUT)

test: setup
	$(PY) -m pytest --ignore tests/containers $(PYTEST_ARGS)

test-unit: setup
	$(PY) -m pytest tests/unit $(PYTEST_ARGS)

# Images and containers on a real Docker daemon: the one that answers, or as root one that is
# installed, started and stopped again. Without the registry of the base image, a base is made.
test-containers: setup
	images/engine.sh start
	status=0; \
	DFLASH_IMAGE_BASE=$$(images/engine.sh base) && export DFLASH_IMAGE_BASE && \
	$(PY) -m pytest tests/containers $(PYTEST_ARGS) || status=$$?; \
	images/engine.sh stop; \
	exit $$status

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m ci lint

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Every cell with every prompt, and the newest release with speed: hours; keeps the results in
# docs/results/.
matrix: $(VENV)/.installed
	status=0; \
	$(PY) -m ci run '*' --profile tiny --out out/matrix --resume --save $(MATRIX_ARGS) || status=$$?; \
	$(PY) -m ci run 'vllm-0.32.0/*/cpu/smollm2-135m' --profile full --compiled --out out/matrix-full --resume --save $(MATRIX_ARGS) || status=$$?; \
	$(PY) -m ci report --readme; \
	exit $$status

# The tests of the reference need torch: the environment for its replay has it. MLX is for the
# tests of its back-end, which run on any CPU.
setup: $(VENV)/.installed
	$(PY) -m ci env reference --link $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r ci/data/mlx.txt

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed here (the engine wheels ask for it): make PYTHON=python3.12 …")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist
