#!/bin/bash
# tests/fuzz/build.sh OUT: the fuzzing program, by clang with libFuzzer and the address and undefined-behaviour sanitizers.
set -e
out=$1
for clang in clang++-19 clang++-18 clang++-17 clang++-16 ""; do command -v "$clang" > /dev/null && break; done
[ -n "$clang" ] || { echo "no clang++ from 16 on here: Debian's packages clang-16 and libclang-rt-16-dev" >&2; exit 2; }
mkdir -p "$out/objects"
flags="-std=c++20 -O1 -gline-tables-only -Isrc -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -DFMT_HEADER_ONLY"
build() {
  object="$out/objects/$(echo "$1" | tr / _).o"
  [ "$object" -nt "$1" ] || $clang $flags -c "$1" -o "$object"
}
export -f build
export out flags clang
files="tests/fuzz/targets.cc $(ls src/base/*.cc src/recipe/*.cc src/data/*.cc src/checkpoint/state.cc src/checkpoint/hub_files.cc src/launch/hostfile.cc src/launch/exports.cc src/launch/environment.cc)"
echo $files | tr ' ' '\n' | xargs -P "$(nproc)" -I {} bash -c 'build {}'
$clang -fsanitize=fuzzer,address,undefined "$out"/objects/*.o -lyaml -lxxhash -o "$out/fuzz"
