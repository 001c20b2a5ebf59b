#!/usr/bin/env python3
"""Checks that every #include in src goes downward or stays in its folder (docs/design.md, "Floors").

usage: tools/check_floors.py [SRC]

Prints one line an offence and exits 1, or prints nothing and exits 0.
"""

import pathlib
import re
import sys

# A folder may include its own headers and those of folders on lower floors. ops lies between the first floor's data
# (recipe, models) and what moves its buffers (comm, memory), hence the half floor.
FLOORS = {
    "base": 0,
    "recipe": 1, "models": 1, "kernels": 1, "ops": 1,
    "comm": 1.5, "memory": 1.5, "launch": 2,
    "step": 3, "data": 3, "engine": 3,
    "plan": 4, "checkpoint": 4,
    "train": 5,
    "cli": 6,
}
PAPER = {"base", "recipe", "models", "ops", "launch", "data", "step", "plan", "checkpoint", "cli"}
METAL = {"kernels", "comm", "memory", "engine", "train"}
METAL_FILES = {"cli/engine_main.cc"}    # the metal wing's own program

# Of the metal wing, but nothing of it beside what numbers look like: headers alone, without torch.
FORMATS = {"kernels/bf16.h", "kernels/optimizer.h"}

# Beyond the floors: recipe and models know nothing of each other, nor of ops; launch starts processes and computes nothing.
FORBIDDEN_PAIRS = {("launch", folder) for folder in ("recipe", "models", "ops", "kernels", "comm", "memory")}

INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)
TORCH = re.compile(r"^(torch|ATen|c10|caffe2|gloo)/")
CUDA = re.compile(r"^(cuda|cudnn|cublas|nccl|nvtx)[A-Za-z0-9_]*(\.h|\.hpp|/)")


def offences_of(name, text):
    """Yields the offences of one file; `name` is its path below src, with slashes."""
    folder = name.split("/")[0]
    for match in INCLUDE.finditer(text):
        header = match.group(2)
        line = text.count("\n", 0, match.start(2)) + 1
        target = header.split("/")[0]
        is_paper = folder in PAPER and name not in METAL_FILES
        if folder not in FLOORS:
            yield f"{name}: the folder '{folder}' has no floor; give it one in tools/check_floors.py and docs/design.md"
            return
        if TORCH.match(header) and (is_paper or folder == "kernels"):
            yield f"{name}:{line}: includes {header}: {folder} knows no torch"
        elif CUDA.match(header) and is_paper:
            yield f"{name}:{line}: includes {header}: {folder} knows no CUDA"
        elif match.group(1) == '"' and "/" in header and target in FLOORS and target != folder:
            if is_paper and target in METAL and header not in FORMATS:
                yield f"{name}:{line}: includes {header}: {folder} is of the paper wing, {target} of the metal wing"
            elif FLOORS[target] >= FLOORS[folder] or (folder, target) in FORBIDDEN_PAIRS:
                yield f"{name}:{line}: includes {header}: {target} does not lie below {folder}"


def offences(src):
    """Returns all offences below the folder `src`, in order of file and line."""
    found = []
    for path in sorted(src.rglob("*")):
        if path.suffix in (".h", ".cc", ".cu", ".cuh"):
            found += offences_of(path.relative_to(src).as_posix(), path.read_text(encoding="utf-8"))
    return found


def main(arguments):
    src = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).resolve().parents[1] / "src"
    found = offences(src)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
