#!/usr/bin/env python3
"""bench/lengths.py [--build build] [--no-rows]

The longest sequences, as planned, beside what the reference published for its recipes. Each recipe in recipes/ is planned for the
machines that the reference ran it on (8 GPUs and 1.9 TB of host memory a machine), and Qwen3-32B on one H200 beside hosts of 0.5, 1 and
2 TB; on the smallest its fp32 states fit as split master weights or on a disk only. Predicted: no GPU is used. Rows go to bench/results/lengths.jsonl, a Markdown table to stdout.
"""

import argparse
import datetime
import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Recipe, GPUs, nodes, GPU, GiB of one as the driver reports it, host memory of a node, published tokens (None: never said), more arguments.
H100, H200 = ("H100", "79GiB"), ("H200", "139GiB")
NODE = "1769GiB"  # 1.9 TB
CASES = [
    ("run-h100-sp1-llama-8b", 1, 1, H100, NODE, 500_000), ("run-h200-sp1-llama-8b-liger-offload-tiled-mlp", 1, 1, H200, NODE, 1_200_000),
    ("run-h200-sp1-llama-8b-liger-offload-tiled-mlp", 1, 1, H200, "125GiB", None),
    ("run-h100-sp8-llama-8b", 8, 1, H100, NODE, 3_800_000), ("run-h100-sp32-llama-8b", 32, 4, H100, NODE, 15_500_000),
    ("run-h100-sp8-llama-70b", 8, 1, H100, NODE, 200_000), ("run-h100-sp32-llama-70b", 32, 4, H100, NODE, 4_000_000), ("run-h100-sp64-llama-70b", 64, 8, H100, NODE, 10_000_000),
    ("run-h100-sp1-qwen3-32b", 1, 1, H100, NODE, 230_000), ("run-h100-sp8-qwen3-32b", 8, 1, H100, NODE, 1_550_000), ("run-h100-sp32-qwen3-32b", 32, 4, H100, NODE, 7_000_000),
    ("run-h100-sp64-qwen3-32b", 64, 8, H100, NODE, 15_000_000),
    ("run-h100-sp1-qwen3-32b", 1, 1, H200, "466GiB", None, "memory.master_weights=split"), ("run-h100-sp1-qwen3-32b", 1, 1, H200, "466GiB", None, "--disk", "1TiB"), ("run-h100-sp1-qwen3-32b", 1, 1, H200, "931GiB", None), ("run-h100-sp1-qwen3-32b", 1, 1, H200, "1863GiB", None),
]


def planned(build, recipe, gpus, nodes, gpu, host, *more):
    """What `ulysses plan` says of the recipe on those machines, and the command."""
    command = ["plan", f"recipes/{recipe}.yml", "--gpus", str(gpus), "--nodes", str(nodes), "--gpu", gpu[0], "--gpu-memory", gpu[1], "--host-memory", host, "--json", *more]
    done = subprocess.run([build / "ulysses", *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), "build/ulysses " + " ".join(command)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--no-rows", action="store_true")
    arguments = parser.parse_args()
    now = datetime.datetime.now(datetime.timezone.utc)
    rows = []
    print("| recipe | GPUs | host memory of each machine | published | planned | then full |\n| --- | --- | --- | --- | --- | --- |")
    for recipe, gpus, nodes, gpu, host, published, *more in CASES:
        facts, command = planned(arguments.build.resolve(), recipe, gpus, nodes, gpu, host, *more)
        longest = facts["longest"]
        tokens, limit = longest["max_length"], longest.get("limited_by")
        rows.append({"run": now.strftime("%Y%m%dT%H%M%S"), "system": "ulysses", "length": tokens, "what": "longest sequence, planned", "recipe": recipe, "gpus": gpus, "gpu": gpu[0], "gpu_memory": gpu[1], "nodes": nodes,
                     "host_memory": host, "limited_by": limit, "published": published, "published_fits": facts["fits"] if published else None, "command": command, "machine": "planned, no GPU used", "date": now.date().isoformat()})
        beside = f"{published:,} | {tokens:,} ({tokens / published:.1f}x)" if published else f"none | {tokens:,}"
        print(f"| {recipe} | {gpus} x {gpu[0]} | {' '.join([host, *more])} | {beside} | {limit} |", flush=True)
    if not arguments.no_rows:
        with open(ROOT / "bench" / "results" / "lengths.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
