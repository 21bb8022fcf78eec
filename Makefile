# `make run` and `make test` are the whole set-up on a machine with Python 3.11+ and make.
.DEFAULT_GOAL := help
.PHONY: help run test coverage check format migrate fuzz bill clients bench vercel-check sandbox lock clean

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
# The lists name every package, so nothing is left to resolve: a resolver may take a release that is newer than the list.
LOCKED := -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r
PIP := $(PY) $(LOCKED)

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

run: .venv/local.done ## start the gateway on an embedded Supabase, 127.0.0.1:8000 (PORT)
	@LOG_FORMAT=$${LOG_FORMAT:-console} $(PY) app.py

test: .venv/dev.done ## everything, on the embedded PostgreSQL; no network
	$(PY) -m pytest -q -n 4 --dist loadgroup $(ARGS)

coverage: .venv/dev.done ## the same tests, and how much of the code they run (branches too)
	@rm -rf build/coverage && mkdir -p build/coverage
	$(PY) -m coverage run -m pytest -q -n 4 --dist loadgroup $(ARGS)
	@$(PY) -m coverage combine -q
	@$(PY) -m coverage report

check: .venv/dev.done ## types, lint, imports, shape, dependencies, spelling (ARGS="imports spelling" for some)
	@$(PY) -m tests.house.check $(ARGS)

format: .venv/dev.done ## put the code into its form
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

migrate: .venv/local.done ## bring DATABASE_URL (or the embedded database) up to date
	@$(PY) -m gateway.runtime.migrate

sandbox: .venv/local.done ## the OpenRouter simulator alone, on 127.0.0.1:8787
	@$(PY) -m sandbox

fuzz: .venv/dev.done ## let Schemathesis look for 5xx and undocumented statuses (ARGS=examples an operation)
	$(PY) -m tests.fuzz $(ARGS)

bill: .venv/dev.done ## compare 2,000 random requests' charges with the upstream's bill (ARGS="requests seed")
	$(PY) -m tests.bill $(ARGS)

clients: .venv/local.done .venv-clients/done tests/clients/node/node_modules/.done ## test other people's clients (Node 20+ too; ARGS="langchain openai-node" for some)
	@$(PY) tests/clients/run.py $(ARGS)

bench: .venv/dev.done ## measure beside nginx and the upstream (needs wrk and nginx), or AGAINST=COMMIT (ROUNDS=9 LIMIT=3)
	$(PY) -m benchmarks$(if $(AGAINST),.compare $(AGAINST)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(LIMIT),--limit $(LIMIT)) $(ARGS)

vercel-check: ## the bundle that Vercel would install: size, cold import, import without the embedded database
	$(PYTHON) benchmarks/bundle.py

lock: .venv/dev.done ## lock the dependencies anew; ARGS="--upgrade" for newer ones
	.venv/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.11 requirements.in -o requirements.txt $(ARGS)
	.venv/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.11 --universal -c requirements.txt requirements-local.in -o requirements-local.txt $(ARGS)
	.venv/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.11 --universal -c requirements-local.txt requirements-dev.in -o requirements-dev.txt $(ARGS)
	.venv/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.11 --universal requirements-clients.in -o requirements-clients.txt $(ARGS)

clean: ## remove what make made; the data folder stays
	rm -rf .venv .venv-clients tests/clients/node/node_modules build .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { echo "No .venv could be made, for the reason above (on Debian it may lack: apt-get install python3-venv)."; rm -rf .venv; exit 1; }

.venv/local.done: requirements-local.txt | .venv/bin/python
	@echo "Installing what the gateway needs (once, some minutes at most)"
	@$(PIP) requirements-local.txt
	@touch $@

.venv/dev.done: requirements-dev.txt | .venv/bin/python
	@echo "Installing the gateway and its tools (once, about a minute)"
	@$(PIP) requirements-dev.txt
	@touch $@ .venv/local.done

.venv-clients/done: requirements-clients.txt | .venv/bin/python
	@echo "Installing other people's clients for Python (once, about a minute)"
	@test -x .venv-clients/bin/python || $(PY) -m venv .venv-clients
	@.venv-clients/bin/python $(LOCKED) requirements-clients.txt
	@touch $@

tests/clients/node/node_modules/.done: tests/clients/node/package-lock.json | .venv/bin/python
	@$(PY) tests/clients/run.py --check-node
	@echo "Installing other people's clients for Node (once, some seconds)"
	@cd tests/clients/node && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@
