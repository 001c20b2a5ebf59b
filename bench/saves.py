#!/usr/bin/env python3
"""bench/saves.py [--length 2048] [--cycles 5] [--ranks 1] [--build build]

What saving costs: one state in 20 steps, against steps without. Llama shape, D 512, F 1536, 4 layers, 8:4 heads, V 8192, fp32, random weights, on the CPU.

One run saves every 40 steps: the 20 steps after a save bear its copy and its writing, the 20 after them nothing, in turn, so that a machine whose speed
drifts treats both alike. The time of the i-th step after a save, and of the i-th of the others, is the median over the cycles. Rows go to
bench/results/saves.jsonl.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=8192, max_position_embeddings=8192,
             rms_norm_eps=1e-5, tie_word_embeddings=False)
BETWEEN = 20


def run(length, cycles, ranks, build):
    """Returns the steps' times, saving included, and a state's bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    steps = 2 * BETWEEN * (cycles + 1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("SAVES_FOLDER")) as name:
        folder = pathlib.Path(name)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rope_theta=10000.0, **SHAPE)))
        ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], 4 * length).astype(np.int32)
        save_file({"ids": ids, "trained": np.ones(4 * length, np.uint8), "starts": np.arange(5, dtype=np.int64) * length}, folder / "tokens.safetensors",
                  metadata={"format": "ulysses-tokens-1", "vocabulary": str(SHAPE["vocab_size"])})
        (folder / "run.yml").write_text(f"""
model: {{name_or_path: {folder}/model, dtype: fp32, init: random}}
data: {{sources: [{folder}/none.jsonl], max_length: {length}}}
optimizer: {{learning_rate: 1.0e-4}}
sequence_parallel_size: {ranks}
epochs: 100000
exit_iteration: {steps}
checkpoint: [{{type: deepspeed, output_dir: {folder}/states, save_every_n_steps: {2 * BETWEEN}, save_total_limit: 1}}]
train_log_metrics_path: {folder}/metrics.jsonl
kill_switch_path: {folder}/stop
""")
        processes = [subprocess.Popen([build / "ulysses-engine", "train", folder / "run.yml", "--model", folder / "model", "--tokens", folder / "tokens.safetensors", "--device", "cpu"],
                                      env={**os.environ, "RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": "29813"} if ranks > 1 else None,
                                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for r in range(ranks)]
        said = [process.communicate()[1] for process in processes]
        if any(process.returncode for process in processes):
            sys.exit("\n".join(said))
        times = [json.loads(line)["iter_time"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        state = next((folder / "states").glob("global_step_*"))
        return times[2 * BETWEEN:], sum(path.stat().st_size for path in state.iterdir())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    arguments = parser.parse_args()
    times, state = run(arguments.length, arguments.cycles, arguments.ranks, arguments.build)
    at = [statistics.median(times[i + 2 * BETWEEN * cycle] for cycle in range(arguments.cycles)) for i in range(2 * BETWEEN)]
    saving, others = sum(at[:BETWEEN]), sum(at[BETWEEN:])
    cost = saving / others - 1
    print(f"a state of {state / 2**20:.0f} MiB in {BETWEEN} steps of {others / BETWEEN:.2f} s: {saving:.2f} s instead of {others:.2f} s, {100 * cost:+.2f} %; the first steps after it: "
          + " ".join(f"{t:.2f}" for t in at[:4]))
    row = dict(run=datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S"), system="ulysses", ranks=arguments.ranks, length=arguments.length, state_mib=round(state / 2**20, 1), seconds_a_step=round(others / BETWEEN, 4), seconds_with_a_save=round(saving, 3),
               seconds_without=round(others, 3), cost_percent=round(100 * cost, 2), cycles=arguments.cycles, command="bench/saves.py " + " ".join(sys.argv[1:]),
               machine=f"{os.cpu_count()} cores, {platform.machine()}", date=datetime.date.today().isoformat())
    with open(ROOT / "bench" / "results" / "saves.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
