# Everything a developer does here. `make help` lists it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Looked up when a command needs it, after `setup`: .venv may be a link, and what is started through it must not need it.
VENV = $(shell readlink -f .venv)/bin
PREFIX ?= /opt/uenvd
DESTDIR ?=
# Two processes, a file of tests each: as many as the smallest machine has cores.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: help setup plugin demo test check check-python check-plugin faults netfs bench bench-pull bench-slurm bench-uenvctl install clean

help: ## say what can be made
	@printf 'uenvd: scientific software stacks as squashfs images\n\n'
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: ## install packages, .venv and the plugin (as root; quick when done)
	@scripts/setup.sh
	@$(MAKE) plugin

plugin: ## build the Slurm plugin
	@$(MAKE) --silent -C slurm-plugin

demo: setup ## the whole thing on this machine: registry, two-node Slurm, uenvd, jobs (root)
	@$(VENV)/python scripts/demo.py

test: setup ## prove that users can run it, then check, then all tests
	@scripts/check-nobody.sh
	@$(MAKE) check
	@$(VENV)/pytest $(PYTEST_ARGS)

check: check-python check-plugin ## linters, types, import rules, plugin under sanitizers

check-python: # the same without the plugin
	$(VENV)/ruff check --quiet .
	$(VENV)/ruff format --quiet --check .
	$(VENV)/mypy
	$(VENV)/lint-imports --no-logo

check-plugin: # the plugin's compiler warnings and its unit tests under ASan and UBSan
	$(MAKE) -C slurm-plugin check

faults: setup ## 2,000 faults in registry, network and cache, some minutes (root)
	@UENVD_FAULTS=$${UENVD_FAULTS:-2000} UENVD_FOLLOW_STEPS=$${UENVD_FOLLOW_STEPS:-60000} \
		$(VENV)/pytest -s tests/integration/test_registry_fault_campaign.py tests/fuzz/test_fuzz_following.py

netfs: setup ## the shared cache on a real NFS server, in a small machine of its own, 15 minutes (root)
	@$(VENV)/python scripts/netfs.py -s $(or $(NETFS),tests/netfs)

bench: setup ## measure: serving, against squashfuse_ll and the kernel's squashfs (root)
	@$(VENV)/python tests/bench/serving.py
	@$(MAKE) bench-slurm bench-uenvctl

bench-pull: setup ## measure: pulling, against the oras command and skopeo
	@$(VENV)/python tests/bench/pulling.py; first=$$?; $(VENV)/python tests/bench/lazystart.py && exit $$first

bench-slurm: setup ## measure: what the plugin costs srun (root)
	@$(VENV)/python tests/bench/slurm_latency.py

bench-uenvctl: setup ## measure: how long uenvctl takes, against its limits (root)
	@$(VENV)/python tests/bench/uenvctl_latency.py

install: setup ## install below $(DESTDIR)$(PREFIX), units and plugin below $(DESTDIR)
	@$(VENV)/python scripts/install_tree.py --destdir '$(DESTDIR)' --prefix '$(PREFIX)'
	@$(MAKE) --silent -C slurm-plugin install DESTDIR='$(DESTDIR)'

clean: ## remove what was built (the demo's downloads stay; see recipes/README.md)
	@if [ -L .venv ]; then rm -rf "$$(readlink -f .venv)"; fi
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@$(MAKE) --silent -C slurm-plugin clean
