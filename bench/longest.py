#!/usr/bin/env python3
"""bench/longest.py RECIPE [--device cuda] [--step 0.002] [key.path=value ...]

Is data.max_length=auto the longest that really runs? The planned length is rehearsed, and then, by bisection, longer ones with the
planner's limit switched off: each with the leanest program of that length, for whose need the plan is told there is room. What a
rehearsal cannot allocate is too long. A row goes to bench/results/lengths.jsonl. Needs a GPU: on the CPU a fifth of the memory is
left to others on purpose.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def ulysses(build, verb, recipe, *arguments):
    """Returns the exit code, the JSON answer and what was said on stderr."""
    done = subprocess.run([build / "ulysses", verb, recipe, *arguments, "--json"], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None, done.stderr


def needed(build, recipe, length, arguments):
    """Device bytes to tell the plan of, so that it fits; the least, to 0.1 %."""
    low, high = 1 << 30, 1 << 40
    while high - low > high // 1000:
        middle = (low + high) // 2
        code, facts, said = ulysses(build, "plan", recipe, *arguments, f"data.max_length={length}", f"memory.device={middle}")
        if facts is None:
            sys.exit(said)
        low, high = (low, middle) if facts["fits"] else (middle, high)
    return high


def runs(build, recipe, length, arguments, device_bytes=None):
    limit = [f"memory.device={device_bytes}"] if device_bytes else []
    code, facts, said = ulysses(build, "rehearse", recipe, *arguments, f"data.max_length={length}", *limit)
    why = "runs" if code == 0 else f"exit code {code}: {(said.strip() or 'nothing said').splitlines()[-1]}"
    print(f"{length:>12,} tokens: {why}", file=sys.stderr, flush=True)
    return code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("recipe", type=pathlib.Path)
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--step", type=float, default=0.002, help="bisected so far, as a share of the length")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    a = parser.parse_args()
    arguments = ["--device", a.device, *a.keys]
    code, facts, said = ulysses(a.build, "plan", a.recipe, *arguments, "data.max_length=auto")
    if facts is None or not facts["longest"]["max_length"]:
        sys.exit(said or "nothing fits")
    planned = facts["longest"]["max_length"]
    ok = runs(a.build, a.recipe, planned, arguments)
    low, high = planned, int(planned * 1.08)
    while ok and high - low > a.step * planned:
        middle = (low + high) // 2
        if runs(a.build, a.recipe, middle, arguments, needed(a.build, a.recipe, middle, arguments)):
            low = middle
        else:
            high = middle
    print(f"auto {planned:,} tokens, {'runs' if ok else 'DOES NOT RUN'}; the longest that ran {low:,}: auto is {100 * (1 - planned / low):.2f} % short of it")
    now = datetime.datetime.now(datetime.timezone.utc)
    row = {"run": now.strftime("%Y%m%dT%H%M%S"), "system": "ulysses", "length": planned, "what": "data.max_length=auto, and the longest that a rehearsal ran with the planner's limit switched off", "predicted": planned, "measured": low, "ok": ok,
           "command": "bench/longest.py " + " ".join(sys.argv[1:]), "machine": "", "date": now.date().isoformat()}
    with open(ROOT / "bench" / "results" / "lengths.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
