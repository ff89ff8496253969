# make demo   from nothing to a trained, measured and used bundle (about seven minutes on two cores)
# make test   the whole test suite
# make lint   ruff and mypy
# make test-real DATA=folder   the short runs on real images
# make locks  lock files for an installation, with hashes and licences; needs uv, and where to find the CPU build of torch:
#             make locks CPU_TORCH='--find-links FOLDER'   or   --index URL
# Each makes its own environment in .venv first. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
UV ?= uv
CPU_TORCH ?=
# idle threads sleep instead of spinning: beside another busy process spinning makes a step ten times slower
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint format test-real locks clean

demo: $(VENV)/installed-demo
	$(BIN)/fiducial demo

test: export OMP_NUM_THREADS := 1
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0 --durations 15 -m "not slow"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0 --durations 15 -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-real: $(VENV)/installed-test
	@test -n "$(DATA)" || { echo "usage: make test-real DATA=folder-of-real-images" >&2; exit 2; }
	FIDUCIAL_REAL_DATA="$(abspath $(DATA))" $(BIN)/python -m pytest tests/real -s

LOCK := $(UV) pip compile pyproject.toml --extra dicom --extra onnx --extra openvino --constraint constraints.txt --quiet \
	--generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-emit-index-url --no-emit-find-links --no-header --no-annotate

locks: $(VENV)/installed-test
	$(LOCK) --output-file locks/cuda.txt
	$(LOCK) $(CPU_TORCH) --constraint locks/cpu.in --output-file locks/cpu.txt
	$(UV) tool run pip install --dry-run --ignore-installed --no-deps --require-hashes --quiet \
		--requirement locks/cuda.txt --report locks/report.json
	$(BIN)/python -m pipelines.export.lock locks/report.json locks/licences.json
	rm locks/report.json

$(VENV)/installed-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo runs
