"""What tests of tiers share: a small job whose programs change from micro-batch to micro-batch, and room with which a plan uses a tier."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

import fixtures  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"
RECIPE = """\
micro_batch_size: 1
gradient_accumulation_steps: 2
epochs: 1
seed: 7
model: {name_or_path: model, dtype: fp32, init: random}
data: {sources: [chats.jsonl], max_length: 512, div_length: 16, cache_dir: cache}
optimizer: {learning_rate: 1.0e-2}
deepspeed: {gradient_clipping: 0.5}
checkpoint: {type: huggingface, output_dir: out, save_every_n_steps: 1, save_end_of_training: true}
train_log_metrics_path: metrics.jsonl
"""
# Lengths from one end to the other, so that the program changes from micro-batch to micro-batch; three steps in an epoch of six.
WORDS = [60, 1, 25, 8, 60, 3]
NUM_STEPS = 3
HOST, DISK = ["memory.host=64MiB"], ["memory.disk=scratch"]
LITTLE_HOST = [[f"memory.host={kib}KiB", *DISK] for kib in (64, 128, 256, 512, 1024)]


def make_job(folder):
    """A recipe (run.yml), a model that begins at random, chats of many lengths, an empty folder scratch; the cache is all tests'."""
    shutil.copytree(fixtures.shared() / "model", folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    fixtures.config(folder, "num_hidden_layers=5", "max_position_embeddings=512")
    fixtures.rows(folder, *({"messages": fixtures.conversation(i, words)} for i, words in enumerate(WORDS)))
    (folder / "cache").symlink_to(fixtures.shared() / "cache")
    (folder / "scratch").mkdir()
    (folder / "run.yml").write_text(RECIPE)


def command(*arguments, verb="train"):
    return [str(ULYSSES), verb, "run.yml", "--device", "cpu", *map(str, arguments)]


def run(folder, *arguments, verb="train", code=0, before=(), **environment):
    done = subprocess.run([*before, *command(*arguments, verb=verb)], cwd=folder, env=fixtures.environment(**environment), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def clear(folder):
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)


def saved(folder):
    """The weights of each checkpoint, as bytes."""
    places = (folder / "out").iterdir() if (folder / "out").exists() else ()
    return {path.name: (path / "model.safetensors").read_bytes() for path in places}


def train(folder, *arguments, **environment):
    """Returns loss and norm of each step, what was saved on the way and at the end, and what was said."""
    clear(folder)
    said = run(folder, *arguments, **environment).stderr
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = saved(folder)
    assert weights.keys() == {f"global_step_{i + 1}" for i in range(NUM_STEPS)}
    assert os.listdir(folder / "scratch") == []
    return [(step["loss"], step["grad_norm"], step["tokens"]) for step in steps], weights, said


def longest_micro_batch(said):
    """Tokens of the longest micro-batch, from a plan in words."""
    return int(next(line for line in said.splitlines() if line.startswith("sequence")).split("micro-batch has ")[1].split()[0])


def plan(folder, *arguments):
    return json.loads(run(folder, "--json", *arguments, verb="plan").stdout)


def places(facts, what):
    return {layer[what] for layer in facts["layers"]}


def device_room(priced, percent):
    """A device of which a plan may use, beside program and libraries, so much of what was priced: it leaves a twentieth free."""
    return f"memory.device={(priced['libraries'] + (priced['total'] - priced['libraries']) * percent // 100) * 20 // 19 + 1}"


# What the plan is to do, by what it says; and the room beside a device that is too small, of which one way will do.
WAYS = {
    "layers on the host": ([HOST], lambda p: "host" in places(p, "input") and p["states"] == "states on the device"),
    "layers on the disk": ([DISK], lambda p: "disk" in places(p, "output") and p["states"] == "states on the device"),
    "layers on both": (LITTLE_HOST, lambda p: {"host", "disk"} <= places(p, "input")),
    "optimizer on the host": ([HOST], lambda p: p["states"].startswith("optimizer on the host")),
    "optimizer and gradients on the host, updated there": ([HOST], lambda p: p["states"].startswith("optimizer and gradients on the host, updated there")),
    "weights on the host": ([HOST], lambda p: "weights on the host" in p["states"]),
    "optimizer on the disk": ([DISK], lambda p: p["states"].startswith("optimizer on the disk")),
    "optimizer on the disk, gradients on the host": (LITTLE_HOST, lambda p: p["disk_bytes"] > 0 and p["host_bytes"] > 0 and "gradients" in p["states"]),
    "rebuilt": ([[]], lambda p: "rebuilt" in places(p, "input")),
}


def room_for(folder, changes, longest, way):
    """The most room on the device with which the plan does so, and what else is to be said on the command line."""
    beside, does = WAYS[way]
    here = [*changes, f"data.max_length={longest}"]
    for percent in range(100, 16, -2):
        for other in beside:
            room = [*other, device_room(plan(folder, *here, *other)["bytes"], percent)]
            found = plan(folder, *here, *room)
            if found["fits"] and does(found):
                return room
    raise AssertionError(f"no plan has {way}")
