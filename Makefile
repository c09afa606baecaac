# make quickstart is where to begin; `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests and examples never ask a model hub.
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart check lint test format lock bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(VENV)/.installed ## make .venv with everything at its locked version

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf,lora,plot,test,dev]'
	touch $@

quickstart: install ## fine-tune a real model on real text, in a few minutes on two CPU cores
	$(BIN)/python examples/fetch_quickstart.py
	$(BIN)/launcher run examples/quickstart.yaml

check: lint ## format, lint, types, import contracts and unit tests, with a tenth of the fuzzed inputs
	LAUNCHER_FUZZ_FACTOR=0.1 $(BIN)/python -m pytest -q -n 2 tests/unit

lint: install ## format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install ## run all tests; `make packages` installs what those of tests/cluster need
	$(BIN)/python examples/fetch_quickstart.py
	$(BIN)/python -m pytest -n 2 --dist worksteal

# DeepSpeed compiles its CPU Adam when a test offloads the optimizer; tests/cluster runs Slurm and sshd on hosts that it
# makes. Without them, and outside CI, those tests skip and say why.
PACKAGES := g++ slurm-wlm munge openssh-server openssh-client rsync iproute2 shellcheck
.PHONY: packages
packages: ## install Debian packages that some tests need (root)
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=; \
	  for command in g++ sbatch munged sshd ssh rsync ip shellcheck; do command -v $$command >/dev/null || missing=1; done; \
	  test -z "$$missing" || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(PACKAGES) >/dev/null; } \
	  || echo 'missing, and some tests need them: $(PACKAGES)'

format: install ## format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: install ## write the installed versions to constraints.txt
	{ echo '# Every version that the Makefile installs and CI tests. Made with: make lock'; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.txt

bench: install ## run the benchmarks, each against its alternative
	$(BIN)/python benchmarks/advice_accuracy.py
	$(BIN)/python benchmarks/spike_guard.py --quick
	$(BIN)/python benchmarks/launch_overhead.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/goodput.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/checkpoint_stall.py
	$(BIN)/python benchmarks/log_following.py
	$(BIN)/python benchmarks/tokenising.py
	$(BIN)/python benchmarks/scale.py

clean: ## remove what was built, not the runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
