# `make demo` and `make test` do all their set-up themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := ckpt_tool convert reference verify fixtures tests benchmarks

# Programs that tests start by the hundred find the tree compiled, whatever the shell says of bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test fuzz lint format types wheel base check table bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

demo: setup
	$(BIN)/ckpt-tool demo --out ckpt-tool-demo --overwrite

# Outside judges that must not mix with .venv: older releases of transformers, Mistral's own tokenizers.
.judges/%/.ready: tests/judges/%.txt $(VENV)/.ready
	rm -rf .judges/$*
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target .judges/$* -r $<
	touch $@

# TensorFlow, the judge of bundles, and Ray are large, and megatron-core, the judge of torch_dist folders, is built for
# some systems only: where one does not come within two minutes its tests are skipped.
LARGE := .judges/tensorflow/.ready .judges/ray/.ready .judges/megatron/.ready
$(LARGE): .judges/%/.ready: tests/judges/%.txt $(VENV)/.ready
	rm -rf .judges/$*
	if timeout 120 $(BIN)/pip install -q --disable-pip-version-check --no-deps --target .judges/$* -r $<; \
	then touch $@; else rm -rf .judges/$*; echo "$* was not installed: its tests are skipped"; fi

test: setup $(LARGE) .judges/tf4.37/.ready .judges/tf4.57/.ready .judges/mistral-common/.ready
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# Changed inputs for every reader, for so many seconds; `python -m tests.fuzzing --help` tells how to run longer.
FUZZ_SECONDS ?= 120
fuzz: setup
	$(BIN)/python -m tests.fuzzing --seconds $(FUZZ_SECONDS) --jobs 2

lint: setup
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

format: setup
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# mypy wants packages where they are imported from, so it sees the tree as it installs.
types: setup
	rm -rf build/types && mkdir -p build/types/ckpt_tool
	ln -s $(addprefix $(CURDIR)/,$(wildcard ckpt_tool/*) convert reference verify fixtures) build/types/ckpt_tool/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p ckpt_tool

wheel: setup
	rm -rf build/lib build/bdist* build/wheel build/installed && mkdir -p build/wheel
	$(BIN)/pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target build/installed build/wheel/ckpt_tool-*.whl
	cd build/installed && PYTHONPATH=. ../../$(BIN)/python -m ckpt_tool families

# The wheel with its base dependencies alone, in an environment of its own: it converts and verifies without torch.
base: wheel
	rm -rf build/base build/base-work && $(PYTHON) -m venv build/base && mkdir -p build/base-work
	build/base/bin/pip install -q --disable-pip-version-check -c constraints.txt build/wheel/ckpt_tool-*.whl
	du -sh build/base
	cd build/base-work && ../base/bin/python ../../tests/base_install.py ../base/bin/ckpt-tool

check: lint types base test

# family x variant x (bits, parity, judge, round trip)
table: setup .judges/tf4.37/.ready
	CKPT_TOOL_TRANSFORMERS=$${CKPT_TOOL_TRANSFORMERS:-.judges/tf4.37} $(BIN)/python -m ckpt_tool table

# Conversions beside cp and transformers 4.37.2's scripts (where `make test` has set it up), levels beside reading, parity
# beside a forward pass, planted mistakes by mode: one table. Some 12 GB of BENCH_FOLDER.
BENCH_FOLDER ?= build/bench
BENCH_ROUNDS ?= 3
bench: setup
	mkdir -p $(BENCH_FOLDER)
	$(BIN)/python benchmarks/together.py --work $(BENCH_FOLDER) --rounds $(BENCH_ROUNDS) --json $(BENCH_FOLDER)/result.json

clean:
	rm -rf build ckpt-tool-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -prune -exec rm -r {} +
