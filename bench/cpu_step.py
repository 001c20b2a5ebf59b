#!/usr/bin/env python3
"""One whole training step on the CPU: this engine beside Transformers with autograd, in one run on one machine.

Llama shape, D 512, F 1536, 8 layers, 8:4 heads, V 32000, fp32, random weights; forward, backward, clipping, AdamW. The
peer is taken at its best: SDPA attention, fused AdamW, with and without gradient checkpointing. Speed is the median over
steps after the first; memory is the process's peak resident size. Rows go to bench/results/cpu_step.jsonl.

usage: bench/cpu_step.py [--lengths 512 4096] [--rounds 2] [--build build]
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=32000,
             max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False)


def steps_for(length):
    return 8 if length <= 1024 else 4


def run_peer(length, steps, checkpointing):
    """Runs in a process of its own; prints seconds of each step and the peak."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="sdpa")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds = []
    for _ in range(steps):
        ids = torch.randint(0, SHAPE["vocab_size"], (1, length))
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def measure_peer(length, steps, checkpointing):
    command = [sys.executable, __file__, "--peer", str(length), str(steps), "1" if checkpointing else "0"]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return length / statistics.median(figures["seconds"][1:]), figures["peak_kib"] / 2**20


def measure_ours(length, steps, build):
    import numpy as np
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "model").mkdir()
        config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rope_theta=10000.0, **SHAPE)
        (folder / "model" / "config.json").write_text(json.dumps(config))
        ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], steps * length).astype(np.int32)
        save_file({"ids": ids, "trained": np.ones(steps * length, np.uint8), "starts": np.arange(steps + 1, dtype=np.int64) * length}, folder / "tokens.safetensors",
                  metadata={"format": "ulysses-tokens-1", "vocabulary": str(SHAPE["vocab_size"])})
        (folder / "run.yml").write_text(f"""
model: {{name_or_path: {folder}/model, dtype: fp32, init: random}}
data: {{sources: [{folder}/none.jsonl], max_length: {length}}}
optimizer: {{learning_rate: 1.0e-4}}
deepspeed: {{zero_optimization: {{stage: 3}}}}
train_log_metrics_path: {folder}/metrics.jsonl
""")
        process = subprocess.Popen([build / "ulysses-engine", "train", folder / "run.yml", "--model", folder / "model", "--tokens", folder / "tokens.safetensors", "--device", "cpu"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(said)
        print(*[line for line in said.splitlines() if line.startswith("memory:")], file=sys.stderr)
        seconds = [json.loads(line)["step_time"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return length / statistics.median(seconds[1:]), usage.ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--peer", nargs=3)
    args = parser.parse_args()
    if args.peer:
        run_peer(int(args.peer[0]), int(args.peer[1]), args.peer[2] == "1")
        return
    run = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    print(f"{'length':>7} {'system':<32} {'tokens/s':>9} {'peak GiB':>9}")
    for length in args.lengths:
        steps = steps_for(length)
        systems = {"ulysses-plus": lambda: measure_ours(length, steps, args.build), "transformers sdpa": lambda: measure_peer(length, steps, False),
                   "transformers sdpa checkpointing": lambda: measure_peer(length, steps, True)}
        figures = {name: [] for name in systems}
        for _ in range(args.rounds):  # in turn, so that a machine whose speed drifts treats all alike
            for name, measure in systems.items():
                figures[name].append(measure())
        with open(results / "cpu_step.jsonl", "a") as file:
            for name, rounds in figures.items():
                speed, peak = max(s for s, _ in rounds), max(p for _, p in rounds)
                print(f"{length:>7} {name:<32} {speed:>9.0f} {peak:>9.2f}")
                row = dict(run=run, system=name, length=length, tokens_per_second=round(speed, 1), peak_gib=round(peak, 3), command="bench/cpu_step.py",
                           machine=f"{os.cpu_count()} cores, {platform.machine()}", date=datetime.date.today().isoformat())
                file.write(json.dumps(row) + "\n")
        best = max(max(s for s, _ in figures[n]) for n in figures if n != "ulysses-plus")
        least = min(max(p for _, p in figures[n]) for n in figures if n != "ulysses-plus")
        fastest = max((n for n in figures if n != "ulysses-plus"), key=lambda n: max(s for s, _ in figures[n]))
        ours_speed, ours_peak = max(s for s, _ in figures["ulysses-plus"]), max(p for _, p in figures["ulysses-plus"])
        print(f"{length:>7} ratio: {ours_speed / best:.2f}x its fastest ({fastest}); memory {ours_peak / max(p for _, p in figures[fastest]):.2f} of that, {ours_peak / least:.2f} of its leanest")


if __name__ == "__main__":
    main()
