# make demo     set everything up and run the demo (MODEL=Qwen/Qwen2.5-7B-Instruct for another model)
# make test     set everything up and run the tests (ARGS="-k plan" for some of them)
# make test-s3  the store of objects against a real S3 protocol, on loopback
# make test-triton TRITON=3.4.0   the kernels under another Triton, interpreted and compiled
# make check    style, types and import rules
# make docs     build the documentation into site/
#
# JOBS=1 runs the tests in one process at a time, by default it is one per core, eight at most.
# PYTHON=python3.12 chooses the interpreter; it is used when .venv is made. ARGS are handed on.

PYTHON ?= python3
JOBS ?= auto --maxprocesses 8
VENV := .venv
TRITON ?= 3.4.0
READY := $(VENV)/.ready

.PHONY: demo test test-s3 test-triton check docs setup clean

demo: $(READY)
	$(VENV)/bin/kvrag demo $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# In a folder in front of .venv: botocore wants an older python-dateutil than chromadb's kubernetes does.
test-s3: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --target .s3 \
		s3fs 'moto[s3]' flask flask-cors
	PYTHONPATH=.s3 $(VENV)/bin/python -m pytest tests/store/s3_on_loopback.py $(ARGS)

# Interpreters of before 3.9 ask an array of one element for its number, which NumPy 2.2 still gives, with a warning.
test-triton: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target .triton/$(TRITON) triton==$(TRITON) 'numpy<2.3'
	PYTHONPATH=.triton/$(TRITON) $(VENV)/bin/python -m pytest tests/kernels \
		-W 'ignore:Conversion of an array:DeprecationWarning' $(ARGS)

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(ARGS)

setup: $(READY)

# Renewed when a dependency changes; the code itself is installed editable and needs no renewal.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .s3 .triton site dist
