# make demo | make test | make build; each does all the set-up it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
JOBS ?= $(shell nproc)

.PHONY: all setup build demo test docs clean
all: build

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt tools/setup.sh
	tools/setup.sh $(PYTHON) $(VENV)

build: setup
	@cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release > build.log 2>&1 || { cat build.log; rm -f build.log; exit 1; }
	@rm -f build.log
	ninja -C build -j $(JOBS)

demo: build
	$(VENV)/bin/python -m ulysses_plus.demo --build build

test: build
	ctest --test-dir build --output-on-failure -j $(JOBS)
	$(VENV)/bin/python -m pytest tests -q

docs: build
	build/ulysses docs > docs/recipe.md

clean:
	rm -rf build
