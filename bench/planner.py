#!/usr/bin/env python3
"""The plan against what runs take: bytes, and seconds where the machine is idle, over sizes, lengths, ranks, tiers and dtypes on the CPU.

Each configuration is planned (`ulysses plan --json`), then trained for a few steps from random weights on random tokens. Predicted is
what the plan prices, program, libraries and what ATen allocates among it. Measured is what is not mapped from files (RssAnon), of all ranks
together, at its highest, and once the file pages that they map. Seconds need `ulysses doctor --measure` before, and an idle machine.

usage: bench/planner.py [--build build] [--seconds] [--only WORD] [--no-rows]
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
MIB = 1 << 20
RATES = pathlib.Path(os.environ.get("ULYSSES_RATES") or pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or pathlib.Path.home() / ".config") / "ulysses" / "rates.json")
SIZES = {
    "small": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4, vocab_size=24000),
    "deep": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=4, vocab_size=16000),
    "tall": dict(hidden_size=640, intermediate_size=1792, num_hidden_layers=10, num_attention_heads=10, num_key_value_heads=2, vocab_size=20000),
    "wide": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8, vocab_size=16000),
}
SPLIT = "memory.master_weights=split"
# Size, length, ranks, tier (and how much of what a resident run takes the device has), keys. The second of each pair is held out: no
# figure of a plan was ever taken from that size.
CONFIGURATIONS = [
    ("small", 512, 1, None, []), ("tall", 1792, 1, None, []),
    ("small", 4096, 1, None, []), ("tall", 3328, 1, None, []),
    ("deep", 1024, 1, None, []), ("tall", 2560, 1, None, []),
    ("wide", 768, 1, None, ["gradient_accumulation_steps=2"]), ("tall", 1280, 1, None, ["gradient_accumulation_steps=2"]),
    ("small", 2048, 2, None, []), ("tall", 3840, 2, None, []),
    ("wide", 1024, 2, None, []), ("tall", 2304, 2, None, ["gradient_accumulation_steps=2"]),
    ("small", 4096, 1, "host", []), ("tall", 3584, 1, "host", []),
    ("wide", 1024, 1, "host", []), ("tall", 2816, 2, "host", []),
    ("small", 4096, 1, "disk", []), ("tall", 3584, 1, "disk", []),
    ("wide", 1024, 2, "disk", []), ("tall", 3072, 2, "disk", ["gradient_accumulation_steps=2"]),
    ("small", 1024, 1, None, ["model.dtype=bf16"]), ("tall", 1408, 1, None, ["model.dtype=bf16"]),
    ("deep", 1024, 1, None, ["model.dtype=bf16", SPLIT]), ("tall", 2048, 1, None, ["model.dtype=bf16", SPLIT]),
    ("small", 2048, 2, "host", ["model.dtype=bf16", SPLIT]), ("tall", 2176, 1, "host", ["model.dtype=bf16"]),
]


def make_job(folder, size, length, steps):
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rope_theta=10000.0, rms_norm_eps=1e-5, max_position_embeddings=65536, tie_word_embeddings=False, **SIZES[size])
    (folder / "model").mkdir()
    (folder / "scratch").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    vocabulary = SIZES[size]["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, steps * length).astype(np.int32)
    save_file({"ids": ids, "trained": np.ones(len(ids), np.uint8), "starts": np.arange(steps + 1, dtype=np.int64) * length}, folder / "tokens.safetensors",
              metadata={"format": "ulysses-tokens-1", "vocabulary": str(vocabulary)})
    (folder / "run.yml").write_text(f"""\
model: {{name_or_path: {folder}/model, dtype: fp32, init: random}}
data: {{sources: [{folder}/none.jsonl], max_length: {length}}}
train_log_metrics_path: {folder}/metrics.jsonl
""")


def plan(build, folder, keys, rates):
    environment = os.environ if rates else {**os.environ, "ULYSSES_RATES": "/nonexistent"}
    done = subprocess.run([build / "ulysses", "plan", folder / "run.yml", "--device", "cpu", "--json", *keys], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def room_for(build, folder, keys, tier, rates):
    """Room on the device with which the plan puts a good part into the tier."""
    beside = {"host": "memory.host=8GiB", "disk": f"memory.disk={folder}/scratch"}[tier]
    priced = plan(build, folder, [*keys, beside], rates)["bytes"]
    for percent in range(92, 32, -4):
        room = [*keys, f"memory.device={(priced['libraries'] + (priced['total'] - priced['libraries']) * percent // 100) * 20 // 19}", beside]
        found = plan(build, folder, room, rates)
        if found["fits"] and found[f"{tier}_bytes"] * 5 > found["bytes"]["total"]:
            return room
    sys.exit(f"no plan uses the {tier}")


def resident(pid):
    """Bytes of the process that are not mapped from files, and that are."""
    found = {}
    try:
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("RssAnon", "RssShmem", "RssFile"):
                found[key] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found.get("RssAnon", 0) + found.get("RssShmem", 0), found.get("RssFile", 0)


def train(build, folder, ranks, keys, rates):
    """Returns the peak of all ranks together, the mapped file pages of one, and the median seconds of a micro-batch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [build / "ulysses-engine", "train", folder / "run.yml", *keys, "--model", folder / "model", "--tokens", folder / "tokens.safetensors", "--device", "cpu", *(["--rates", RATES] if rates else [])]
    threads = str(max(1, os.cpu_count() // ranks))
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads, **place}, stdout=subprocess.DEVNULL, stderr=open(folder / f"said.{rank}", "w")))
    peak = files = 0
    while any(process.poll() is None for process in processes):
        figures = [resident(process.pid) for process in processes]
        peak, files = max(peak, sum(a for a, _ in figures)), max(files, *(f for _, f in figures))
        time.sleep(0.004)
    if any(process.returncode != 0 for process in processes):
        sys.exit("".join((folder / f"said.{rank}").read_text() for rank in range(ranks)))
    steps = [json.loads(line)["step_time"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return peak, files, statistics.median(steps[1:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--seconds", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--no-rows", action="store_true")
    args = parser.parse_args()
    if args.seconds and os.getloadavg()[0] >= 1:
        sys.exit(f"load {os.getloadavg()[0]:.1f}: seconds need an idle machine")
    run = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    found = []
    for i, (size, length, ranks, tier, keys) in enumerate(CONFIGURATIONS):
        name = " ".join([size, str(length), f"P{ranks}", tier or "resident", *keys])
        if args.only not in name:
            continue
        micro = 2 if "gradient_accumulation_steps=2" in keys else 1
        folder = pathlib.Path(tempfile.mkdtemp(prefix="ulysses-planner-"))
        try:
            make_job(folder, size, length, 3 * micro)
            keys = [f"sequence_parallel_size={ranks}", *keys]
            if tier:
                keys = room_for(args.build, folder, keys, tier, args.seconds)
            facts = plan(args.build, folder, keys, args.seconds)
            peak, files, seconds = train(args.build, folder, ranks, keys, args.seconds)
        finally:
            shutil.rmtree(folder)
        priced = ranks * (facts["bytes"]["total"] + facts["host_bytes"])
        said = facts.get("time", {}).get("step_seconds")
        found.append(dict(name=name, size=size, length=length, ranks=ranks, tier=tier, keys=[k.replace(str(folder), "FOLDER") for k in keys],
                          held_out=i % 2 == 1, priced=priced, peak=peak, files=files, disk=facts["disk_bytes"] * ranks, predicted_seconds=said, seconds=seconds))
        measured = peak + files
        print(f"{name:<60} priced {priced / MIB:8.1f} MiB, measured {measured / MIB:8.1f}, {files / MIB:6.1f} of it mapped from files {100 * (priced / measured - 1):+6.2f} %", flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    rows = []
    for f in found:
        row = dict(run=run, system="ulysses", length=f["length"], size=f["size"], ranks=f["ranks"], tier=f["tier"] or "resident", held_out=f["held_out"])
        end = dict(keys=f["keys"], command="bench/planner.py", machine=machine, date=datetime.date.today().isoformat())
        rows.append(dict(**row, what="bytes of all ranks, MiB: as priced, and the highest RssAnon with mapped files once", predicted=round(f["priced"] / MIB, 1), measured=round((f["peak"] + f["files"]) / MIB, 1), mapped_files=round(f["files"] / MIB, 1), **end))
        if args.seconds and f["predicted_seconds"]:
            rows.append(dict(**row, what="seconds of a step", predicted=round(f["predicted_seconds"], 4), measured=round(f["seconds"], 4), **end))
            print(f"{f['name']:<60} {f['predicted_seconds']:8.3f} {f['seconds']:8.3f} s   {100 * (f['predicted_seconds'] / f['seconds'] - 1):+6.1f} %")
    if not args.no_rows:
        with open(ROOT / "bench" / "results" / "planner.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
