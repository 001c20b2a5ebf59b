# make demo | make test | make build | make fuzz; each does all the set-up it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
JOBS ?= $(shell nproc)

.PHONY: all setup build demo test fuzz docs clean
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
	$(VENV)/bin/python -m pytest tests -q -n 2 --dist worksteal

# What reads files from outside, each for FUZZ_SECONDS; needs clang with libFuzzer.
FUZZ_SECONDS ?= 600
fuzz:
	tests/fuzz/build.sh build/fuzz
	for target in recipe hostfile env safetensors manifest tokens; do \
	  mkdir -p build/fuzz/$$target && FUZZ_TARGET=$$target build/fuzz/fuzz -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=1024 -max_len=65536 -artifact_prefix=build/fuzz/$$target- build/fuzz/$$target tests/fuzz/corpus/$$target || exit 1; \
	done

docs: build
	build/ulysses docs > docs/recipe.md

clean:
	rm -rf build
