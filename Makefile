# Every command sets up what it needs; a fresh clone and Python 3.11 or newer are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install demo test test-gpu coverage check soak fuzz bench bench-peers docs screenshots release sbom format proto clean

help:
	@echo "make demo    one round of handwritten digits: a server and two agents on this machine (TASK=regression)"
	@echo "make test    the tests: of many cases of a kind, one"
	@echo "make coverage  the same, and which lines they do not reach"
	@echo "make test-gpu  the tests that need a GPU, and the speed of training on it (ten minutes)"
	@echo "make check   style, types, house rules, and what bandit and pip-audit say"
	@echo "make soak    every case that make test leaves, and 200 random kills (an hour or more)"
	@echo "make fuzz    coverage-guided fuzzing of what strangers' bytes meet (FUZZ_SECONDS=600 each)"
	@echo "make bench   speed, memory and bytes (minutes); make bench-peers: the same rounds on Flower and NVFlare"
	@echo "make docs    write what docs/ has from the code, and build the documentation site in site/"
	@echo "make sbom    write sbom.json, what is installed as CycloneDX (SBOM_PYTHON=the python of another environment)"
	@echo "make screenshots  take the pictures of the status page in docs/img, of a real run, with Chromium"
	@echo "make release wheel and sdist in dist/, tried in an empty environment on each Python that is here"
	@echo "make format  rewrite the code in the house style"
	@echo "make proto   generate common/pb from proto/"
	@echo "make clean   remove everything that was made"

install: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

TASK ?= classification
demo: $(READY)
	@$(BIN)/python -m experiments.demo --task $(TASK)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Without a GPU every test is skipped, and the benchmark says that there is none.
test-gpu: $(READY)
	$(BIN)/python -m pytest -p no:benchmark tests/gpu
	$(BIN)/python -m benchmarks.train --device cuda --precision bfloat16 --data-on-host --images 12800 --repeats 2

# What the tests reach in their own process has a floor (pyproject.toml). To count it takes a fifth more time.
coverage: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report=term-missing

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m bandit --quiet --configfile pyproject.toml --recursive common edge_agent cloud_server ecavg
	@$(BIN)/python -m tests.hostile.audit

# Every server and trainer is started as users start it: in `make test` they are forked from one that is warm.
soak: export ECAVG_TESTS_COLD := 1
soak: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --soak -m "soak or hypothesis"
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/integration tests/hostile tests/faults
	$(BIN)/python -m tests.faults.soak

# What is new goes to .fuzz/, and what fails to .fuzz/TARGET-crash-…: copy that to tests/fuzz/corpus/TARGET.
FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?= header shard wire config
fuzz: $(VENV)/.fuzz
	for target in $(FUZZ_TARGETS); do mkdir -p .fuzz/$$target && nice $(BIN)/python -m tests.fuzz $$target \
		-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -artifact_prefix=.fuzz/$$target- \
		.fuzz/$$target tests/fuzz/corpus/$$target || exit 1; done

# By itself: there are wheels for x86-64 alone.
$(VENV)/.fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	touch $@

bench: $(READY)
	$(BIN)/python -m benchmarks.round_trip --agents 2 --model tiny --rounds 20
	$(BIN)/python -m benchmarks.round_trip --agents 2 --model mobilenet_v2 --rounds 8
	$(BIN)/python -m benchmarks.round_trip --agents 2 --model resnet50 --rounds 6
	$(BIN)/python -m benchmarks.round_trip --agents 8 --model resnet50 --rounds 4
	$(BIN)/python -m benchmarks.transfer --mib 512 --repeats 5
	$(BIN)/python -m benchmarks.memory --agents 2,8,32 --mib 64
	$(BIN)/python -m benchmarks.agents --agents 300 --rounds 3 --tls
	$(BIN)/python -m benchmarks.waiting --rounds 5 --repeats 5
	$(BIN)/python -m benchmarks.aggregate --agents 8 --repeats 5
	$(BIN)/python -m benchmarks.align --agents 4 --repeats 3
	$(BIN)/python -m benchmarks.train --repeats 3
	$(BIN)/python -m benchmarks.train --repeats 3 --models resnet50 --precision bfloat16

# Flower takes most of the time: half a minute for a round of two agents.
bench-peers: $(READY)
	$(BIN)/python -m benchmarks.peers.nvflare --agents 2 --model tiny --rounds 10
	$(BIN)/python -m benchmarks.peers.nvflare --agents 2 --model resnet50 --rounds 6
	$(BIN)/python -m benchmarks.peers.flower --agents 2 --model tiny --rounds 5
	$(BIN)/python -m benchmarks.peers.flower --agents 2 --model resnet50 --rounds 3

docs: $(READY)
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

SBOM_PYTHON ?= $(BIN)/python
sbom: $(READY)
	$(BIN)/python -m cyclonedx_py environment --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file sbom.json $(SBOM_PYTHON)

screenshots: $(READY)
	$(BIN)/python -m tests.browser.screenshots

# Each Python installs PyTorch anew, which takes minutes.
release: $(READY)
	@$(BIN)/python -m tests.deploy.release

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Generated with the oldest supported version: the code that a version generates needs at least that one.
proto:
	$(PYTHON) -m venv $(VENV)-proto
	$(VENV)-proto/bin/pip install --quiet --disable-pip-version-check 'grpcio-tools==1.76.0'
	$(VENV)-proto/bin/python -m grpc_tools.protoc -Iecavg=proto --python_out=. --pyi_out=. --grpc_python_out=. \
		ecavg/common/pb/ecavg.proto
	rm -rf $(VENV)-proto

clean:
	rm -rf $(VENV) .demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
