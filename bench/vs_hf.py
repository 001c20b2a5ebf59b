#!/usr/bin/env python3
"""Forward and backward of the Llama-3.1-8B shape, side by side on one GPU: Transformers + Liger + cuDNN, then this engine.

For each length one process of bench/hf_step.py, then one of build/bench_step. Each of our rows gets the ratio to the peer,
and how near it is to what the hardware gives: 6 FLOP a token for each parameter in a GEMM, at 725 TFLOP/s; causal
attention at 604 TFLOP/s forward and, 2.5 times as much arithmetic, at 537 backward (../shared/ceilings.md). The forced limit adds
the GEMMs that are recomputed because their results do not fit in memory, where our row tells `recomputed_gemm_flops` (of
a step).

Rows are appended to the results as soon as they are known; progress goes to stderr, a Markdown table to stdout. The whole
run ends within --minutes: where --seconds for each system would not fit, all get fewer, evenly, but always one whole
step after the warm-up. The four lengths at 60 seconds each do not fit in 9.5 minutes: the first three nearly do, and 131072 alone.

usage: bench/vs_hf.py [--lengths 16384,32768,65536,131072] [--seconds 60] [--minutes 9.5] [--only ours|hf]
       bench/vs_hf.py --reduced      # ours alone, 2 layers, 256K to 1M tokens: speed only, not capacity
"""

import argparse
import datetime
import json
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
HIDDEN, FFN, QUERY, KEYS, VOCABULARY, LAYERS = 4096, 14336, 4096, 1024, 128256, 32
GEMM, FORWARD, BACKWARD = 725e12, 604e12, 537e12  # FLOP/s
REDUCED = "speed only, not capacity"

# Seconds before the first step, and tokens/s by length, to share out the time; what is measured does not depend on them.
STARTUP = {"hf": 30, "ours": 20}
TIMED = {"hf": 0, "ours": 1}  # a step that bench_step times by kernel, besides those that count
GUESSED = {"hf": {16384: 7400, 32768: 6000, 65536: 4300, 131072: 2600}, "ours": {16384: 9000, 32768: 7000, 65536: 5000, 131072: 3200}}


def gemm_flops(length, layers):
    parameters = layers * (HIDDEN * (QUERY + 2 * KEYS) + QUERY * HIDDEN + 3 * HIDDEN * FFN) + VOCABULARY * HIDDEN
    return 6 * parameters * length


def attention_flops(length, layers):
    """Forward, the causal half; backward is 2.5 times this."""
    return layers * 2 * length**2 * QUERY


def limit_seconds(length, layers, recomputed_gemm_flops=0):
    forward = attention_flops(length, layers)
    return (gemm_flops(length, layers) + recomputed_gemm_flops) / GEMM + forward / FORWARD + 2.5 * forward / BACKWARD


def guessed_step(system, length, layers):
    """Seconds of a step, for sharing out the time; beyond the table from the limit."""
    table = GUESSED[system]
    return length / table[length] if layers == LAYERS and length in table else 1.2 * limit_seconds(length, layers)


def warmups(system, length, layers):
    """One step; none where a step takes minutes: what only the first does is little of it."""
    return 1 if guessed_step(system, length, layers) < 100 else 0


SHORT_WARMUP = 16384  # the peer's warm-up where a step takes half a minute and more


def guessed_run(system, length, layers, seconds):
    step = guessed_step(system, length, layers)
    if system == "hf" and step > 30:
        return STARTUP[system] + 3 + step * max(1, -(-seconds // step))
    return STARTUP[system] + step * (warmups(system, length, layers) + TIMED[system] + max(1, -(-seconds // step)))


def affordable_seconds(runs, layers, wanted, left):
    """The most seconds, not above `wanted`, with which all these runs end in `left` seconds."""
    low = 1
    for seconds in range(1, int(wanted) + 1):
        if sum(guessed_run(system, length, layers, seconds) for system, length in runs) <= left:
            low = seconds
    return low


def compare(row, peer):
    """Adds to one of our rows what it is measured against."""
    length, layers, speed = row["length"], row["layers"], row["tokens_per_second"]
    limit = length / limit_seconds(length, layers)
    row["limit_tokens_per_second"], row["share_of_limit"] = round(limit, 1), round(speed / limit, 4)
    if "recomputed_gemm_flops" in row:
        forced = length / limit_seconds(length, layers, row["recomputed_gemm_flops"])
        row["forced_limit_tokens_per_second"], row["share_of_forced_limit"] = round(forced, 1), round(speed / forced, 4)
    parts = sum(row.get(f"{n}_seconds", 0) for n in ("attention_forward", "attention_backward", "gemm", "other"))
    steps = max(1, round(parts / (row["seconds"] / row["steps"]))) if row.get("steps") else 1  # that the parts are sums over: one, or all
    for name, times in (("forward", 1.0), ("backward", 2.5)):
        if row.get(f"attention_{name}_seconds"):
            row.setdefault(f"attention_{name}_tflops", round(times * attention_flops(length, layers) * steps / row[f"attention_{name}_seconds"] / 1e12, 1))
    if peer and "tokens_per_second" in peer:
        row["ratio_to_peer"], row["peer"] = round(speed / peer["tokens_per_second"], 3), peer["system"]
    elif peer:
        row["peer_error"] = peer["error"]


def machine():
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "no GPU"


def run_one(command, limit):
    """Rows that the command prints, and an error text. What it says on stderr passes through."""
    try:
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, timeout=limit)
        out, error = done.stdout, None if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as e:
        out, error = (e.stdout or b"").decode() if isinstance(e.stdout, bytes) else e.stdout or "", f"stopped after {limit:.0f} s"
    except OSError as e:
        out, error = "", str(e)
    rows = []
    for line in out.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "length" in row:
            rows.append(row)
    if not rows and error is None:
        error = "printed no row"
    return rows, error


def cell(row, key, form="{}"):
    return form.format(row[key]) if row.get(key) is not None else ""


def table(rows):
    lines = ["| length | system | tokens/s | of the peer | of the limit | of the forced limit | attention TFLOP/s | peak GiB (driver) | steps |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        speed = cell(r, "tokens_per_second", "{:,.0f}") or r.get("error", "")
        attention = " / ".join(cell(r, f"attention_{n}_tflops", "{:.0f}") for n in ("forward", "backward")) if "attention_forward_tflops" in r else ""
        peak = f"{cell(r, 'peak_gib', '{:.1f}')} ({cell(r, 'driver_peak_gib', '{:.1f}')})" if "peak_gib" in r else ""
        ratio = cell(r, "ratio_to_peer", "{:.2f}x") or (f"peer: {r['peer_error']}" if "peer_error" in r else "")
        limit = f"{r['share_of_limit']:.1%} of {r['limit_tokens_per_second']:,.0f}" if "share_of_limit" in r else ""
        forced = f"{r['share_of_forced_limit']:.1%} of {r['forced_limit_tokens_per_second']:,.0f}" if "share_of_forced_limit" in r else ""
        lines.append(f"| {r['length']:,} | {r['system']}{', ' + r['label'] if 'label' in r else ''} | {speed} | {ratio} | {limit} | {forced} | {attention} | {peak} | {cell(r, 'steps')} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--seconds", type=float, default=60, help="for each system and length, at least, if the time allows")
    parser.add_argument("--minutes", type=float, default=9.5, help="for the whole run")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--only", choices=["ours", "hf"])
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--attention", choices=["cudnn", "flash"], default="cudnn", help="of the peer")
    parser.add_argument("--checkpoint-every", type=int, default=1, help="of the peer: recompute every n-th layer only; 0: none")
    parser.add_argument("--engine", type=pathlib.Path, default=ROOT / "build" / "bench_step")
    parser.add_argument("--engine-args", type=shlex.split, default=[], help="more arguments for --engine, in one text")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "vs_hf.jsonl")
    args = parser.parse_args()
    layers = args.layers or (2 if args.reduced else LAYERS)
    lengths = args.lengths or ([262144, 524288, 1048576] if args.reduced else [16384, 32768, 65536, 131072])
    systems = [s for s in ("hf", "ours") if args.only in (None, s) and not (args.reduced and s == "hf")]
    runs = [(system, length) for length in lengths for system in systems]

    begin = time.monotonic()
    stamp = datetime.datetime.now(datetime.timezone.utc)
    common = {"run": stamp.strftime("%Y%m%dT%H%M%S"), "command": shlex.join(["bench/vs_hf.py", *sys.argv[1:]]), "machine": machine(), "date": stamp.date().isoformat()}
    args.results.parent.mkdir(parents=True, exist_ok=True)

    def tell(text):
        print(f"[{time.monotonic() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    tell(f"{common['machine']}; {len(runs)} runs in {args.minutes} minutes")
    known, failed, peer = [], False, {}
    for i, (system, length) in enumerate(runs):
        left = 60 * args.minutes - (time.monotonic() - begin)
        if left < STARTUP[system]:
            tell(f"{system} {length:,}: no time left")
            failed = True
            continue
        seconds = affordable_seconds(runs[i:], layers, args.seconds, left)
        tell(f"{system} {length:,}: {seconds} s asked for, about {guessed_run(system, length, layers, seconds):.0f} s with its start")
        if system == "hf":
            command = [sys.executable, ROOT / "bench" / "hf_step.py", "--length", length, "--seconds", seconds, "--layers", layers, "--attention", args.attention, "--checkpoint-every", args.checkpoint_every]
            if guessed_step(system, length, layers) > 30:
                command += ["--warmup-length", SHORT_WARMUP]
        else:
            command = [args.engine, "--length", length, "--seconds", seconds, "--warmup", warmups(system, length, layers), *(["--layers", layers] if layers != LAYERS else []), *args.engine_args]
        rows, error = run_one(command, left)
        if error and not any("error" in r for r in rows):
            rows.append({"system": "ulysses" if system == "ours" else "transformers", "length": length, "error": error})
        for row in rows:
            row.setdefault("layers", layers)
            if args.reduced:
                row["label"] = REDUCED
            if system == "hf":
                peer[length] = row
            elif "tokens_per_second" in row:
                compare(row, peer.get(length))
            failed = failed or "error" in row and not (system == "hf" and row["error"] == "out of memory")
            known.append(common | row)
            with open(args.results, "a") as file:
                file.write(json.dumps(known[-1]) + "\n")
            tell(f"{row['system']} {length:,}: " + (f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else row.get("error", "?"))
                 + (f", {row['ratio_to_peer']:.2f}x" if "ratio_to_peer" in row else "") + (f", {row['share_of_limit']:.1%} of the limit" if "share_of_limit" in row else ""))
    print(table(known), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
