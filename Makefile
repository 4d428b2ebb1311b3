# `make help` lists the targets. Needs Python 3.11 or later and make; everything else is put into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
MINUTES ?= 1
ROUNDS ?= 9
CLIENTS_DIR ?= $(HOME)/.cache/kimi_proxy/clients
# More than there are cores: half of the time that tests take, they wait.
WORKERS := -n 4 --dist worksteal
INSTALL = PREFIX='$(PREFIX)' UNITDIR='$(UNITDIR)' DESTDIR='$(DESTDIR)' DRY_RUN='$(DRY_RUN)' PYTHON='$(PYTHON)' \
	sh systemd/install.sh
PURE := tests/test_wire.py tests/test_events.py tests/test_answers.py tests/test_tools.py tests/test_filters.py \
	tests/test_requests.py tests/test_replies.py tests/test_errors.py tests/test_settings.py tests/test_logs.py tests/test_layout.py

.DEFAULT_GOAL := help
.PHONY: help demo run test test-node test-clients bench bench-cluster soak test-lowest test-units test-systemd test-cluster \
	test-page quick lint install uninstall toc golden trace clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/run.stamp ## see the proxy answer, with a simulator in place of Kimi: no token needed
	@$(RUN) tests/demo.py

run: $(VENV)/run.stamp ## start the proxy on this machine
	@$(RUN) -m kimi_proxy

test: $(VENV)/test.stamp ## run all tests
	PYTHONASYNCIODEBUG=1 $(RUN) -W error -m pytest $(WORKERS)

test-node: $(VENV)/run.stamp $(VENV)/node.stamp ## test with a program from npm; needs Node 18 or later
	@PYTHONPATH=.:tests $(RUN) tests/node/run.py

test-clients: $(VENV)/run.stamp ## CLIENTS="aider llm": test with real programs, all by default (some GB in CLIENTS_DIR)
	@PYTHONPATH=.:tests $(RUN) tests/clients.py $(CLIENTS_DIR) $(CLIENTS)

bench: $(VENV)/run.stamp ## measure the proxy beside its floors, some 20 minutes; ROUNDS=9 (Linux)
	@PYTHONPATH=tests $(RUN) tests/bench/bench.py --rounds $(ROUNDS)

bench-cluster: $(VENV)/run.stamp ## measure one and two instances behind HAProxy (Linux)
	@PYTHONPATH=tests $(RUN) tests/bench/balancer.py

soak: $(VENV)/run.stamp ## MINUTES=1: mixed traffic with faults, then memory, descriptors and conversations as before (Linux)
	@PYTHONPATH=tests $(RUN) tests/soak.py $(MINUTES)

test-lowest: $(VENV)/test.stamp ## run all tests with the oldest packages that requirements.txt admits
	rm -rf $(VENV)/lowest
	$(PYTHON) -m venv $(VENV)/lowest
	sed -E 's/>=([0-9.]+).*/==\1/' requirements.txt > $(VENV)/lowest/requirements.txt
	$(VENV)/lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		-r $(VENV)/lowest/requirements.txt -r tests/requirements.txt
	$(VENV)/lowest/bin/python -W error -m pytest $(WORKERS)

test-units: $(VENV)/run.stamp ## install into a temporary directory, and check the units (systemd's tools)
	@PYTHONPATH=. $(RUN) tests/units.py $(PYTHON)

test-systemd: $(VENV)/run.stamp ## run it under a real systemd in a container (root; 300 MB; debootstrap systemd-container)
	@PYTHONPATH=.:tests $(RUN) tests/systemd.py

test-cluster: $(VENV)/run.stamp ## put two instances behind HAProxy, then nginx (Debian: haproxy nginx-light)
	@PYTHONPATH=tests $(RUN) tests/cluster.py

test-page: $(VENV)/run.stamp ## use the page at / in a browser (Debian: chromium); PICTURE=tests/page.png: take a picture
	@PYTHONPATH=tests $(RUN) tests/page.py $(PICTURE)

install: ## put module, environment and systemd units in place, as root; PREFIX=/opt/kimi-proxy DESTDIR= DRY_RUN=1
	@$(INSTALL) install

uninstall: ## remove them; configuration and state are left
	@$(INSTALL) uninstall

quick: lint ## lint, layout and the pure tests: seconds
	$(RUN) -W error -m pytest $(PURE)

lint: $(VENV)/test.stamp ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

toc: $(VENV)/run.stamp ## print the module's sections with their lengths
	@$(RUN) tests/toc.py

golden: $(VENV)/run.stamp ## rewrite the events expected of the recorded streams in tests/wire
	@PYTHONPATH=. $(RUN) tests/golden.py

trace: $(VENV)/run.stamp ## FILE=tests/wire/…: print frames and events of a recorded stream
	@PYTHONPATH=. $(RUN) tests/trace.py $(FILE)

clean: ## remove the virtual environment and all caches
	rm -rf tests/node/node_modules $(VENV) .cache .hypothesis .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kimi_proxy needs Python 3.11 or later; name it with: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python's venv is missing; on Debian and Raspberry Pi OS: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/node.stamp: tests/node/package.json tests/node/package-lock.json | $(VENV)/run.stamp
	@command -v npm >/dev/null || { echo "this needs Node and npm; on Debian: sudo apt install npm" >&2; exit 1; }
	cd tests/node && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp tests/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@
