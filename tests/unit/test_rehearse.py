"""A step of the planned length without data, weights and arithmetic: what it takes is what the plan said, and nothing stays."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

import fixtures  # noqa: E402
import tiers  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"
RECIPE = """\
gradient_accumulation_steps: 2
micro_batch_size: 2
model: {name_or_path: model, dtype: fp32}
data: {sources: [nowhere.jsonl], max_length: 3000, div_length: 16, cache_dir: cache}
checkpoint: {type: huggingface, output_dir: out, save_end_of_training: true}
train_log_metrics_path: metrics.jsonl
"""
MIB = 1 << 20
CONFIG = fixtures.CONFIG | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
ROOM = {"host": "memory.host=64MiB", "disk": "memory.disk=scratch"}


@pytest.fixture
def folder(tmp_path):
    """A recipe and a model's configuration: neither weights nor a tokenizer nor data."""
    (tmp_path / "model").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "run.yml").write_text(RECIPE)
    return tmp_path


def run(folder, verb, *arguments, code=0, **environment):
    command = [str(ULYSSES), verb, "run.yml", "--device", "cpu", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=fixtures.environment(**environment), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def plan_of(folder, *arguments):
    return json.loads(run(folder, "plan", "--json", *arguments).stdout)


def room_that_needs(folder, tier, *arguments, optimizer=False):
    """What to add to the command line for a plan that puts something, or the optimizer of a short step, into this tier."""
    if optimizer:
        arguments = (*arguments, "data.max_length=304")
    priced = plan_of(folder, *arguments, ROOM[tier])["bytes"]
    for percent in range(96, 16, -3):
        room = [*arguments, tiers.device_room(priced, percent), ROOM[tier]]
        plan = plan_of(folder, *room)
        if plan["fits"] and plan[f"{tier}_bytes"] > 0 and (not optimizer or "optimizer" in plan["states"]):
            return room
    raise AssertionError(f"no plan uses the {tier}")


def rehearse(folder, *arguments):
    return json.loads(run(folder, "rehearse", "--json", *arguments).stdout)


def listing(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("needs, optimizer", [(None, False), ("host", False), ("disk", False), ("host", True), ("disk", True)])
def test_what_it_takes_is_what_was_planned(folder, ranks, needs, optimizer):
    room = [f"sequence_parallel_size={ranks}"]
    if needs is not None:
        room = room_that_needs(folder, needs, *room, optimizer=optimizer)
    before = listing(folder)
    plan = plan_of(folder, *room)
    found = rehearse(folder, *room)
    assert listing(folder) == before
    assert found["hash"] == plan["hash"] and found["planned_length"] == plan["sequence"]["planned_length"] == (608 if optimizer else 6000)
    assert len(found["ranks"]) == found["world"] == ranks
    for rank in found["ranks"]:
        for tier, planned in [("device", plan["bytes"]["total"] - plan["bytes"]["libraries"]), ("host", plan["host_bytes"]), ("disk", plan["disk_bytes"])]:
            row = rank[tier]
            assert row["predicted_bytes"] == planned, tier
            assert abs(row["measured_bytes"] - planned) <= planned / 50, (tier, row)
            assert row["agree"] is True
            assert (planned > 0) == (tier in ("device", needs)), (tier, planned)
        copies = rank.get("copies", {})
        assert ("exchange" in copies) == (ranks == 2)
        assert {"to_host", "to_device"} <= copies.keys() if needs == "host" else "to_host" not in copies
        assert ("disk" in copies) == (needs == "disk")
        assert all(row["measured_seconds"] > 0 and row["bytes"] > 0 for row in copies.values())
    assert found["agree"] is True


def test_the_process_has_the_arenas_and_little_besides(folder):
    """Seen from outside: by what the kernel says of the whole process."""
    found = rehearse(folder, "sequence_parallel_size=1", "data.max_length=20000")
    process = found["ranks"][0]["process"]
    assert found["ranks"][0]["device"]["predicted_bytes"] > 300 * MIB
    assert abs(process["peak_bytes"] - process["at_start_bytes"] - found["ranks"][0]["device"]["predicted_bytes"]) < 60 * MIB
    assert process["agree"] is True
    planned = plan_of(folder, "sequence_parallel_size=1", "data.max_length=20000")["bytes"]["libraries"]
    assert process["planned_bytes"] == planned + 96 * MIB    # the libraries' files, which ranks share
    assert abs(process["peak_bytes"] - process["arenas_bytes"] - planned) < 60 * MIB


def test_a_long_step_takes_seconds(folder):
    """Attention over so many tokens would take minutes."""
    began = time.monotonic()
    found = rehearse(folder, "sequence_parallel_size=2", "micro_batch_size=1", "data.max_length=200000")
    assert found["planned_length"] == 200000 and found["agree"] is True
    assert time.monotonic() - began < 45


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_updates_that_wait_for_the_next_step_are_made(folder, tier):
    """Under one more forward: master weights and moments come to the device and go back."""
    found = rehearse(folder, *room_that_needs(folder, tier, "sequence_parallel_size=1", optimizer=True))
    assert found["deferred"] is True
    states, copies = 12 * plan_of(folder)["model"]["parameters"] // 2, found["ranks"][0]["copies"]  # at least half of the units
    if tier == "disk":
        assert copies["disk"]["bytes"] > 2 * states
    elif "host_update" in copies:
        assert copies["host_update"]["bytes"] > states
    else:
        assert copies["to_host"]["bytes"] > states and copies["to_device"]["bytes"] > states


def test_it_is_told_in_words(folder):
    said = run(folder, "rehearse", *room_that_needs(folder, "disk", "sequence_parallel_size=1")).stdout
    lines = {line.split(maxsplit=1)[0]: line for line in said.splitlines() if not line.startswith(" ")}
    assert "2 micro-batches of 6,000 tokens on 1 rank" in lines["ran"] and "without the arithmetic" in lines["ran"]
    assert lines["device"].endswith(": agree") and lines["disk"].endswith(": agree") and "touched" in lines["device"]
    assert "none, as predicted" in lines["host"]
    assert "GB/s" in lines["copies"] and "the bytes agree" in lines["plan"]


def test_what_will_not_fit_is_said_before_anything_is_started(folder):
    (folder / "engine").write_text("#!/bin/sh\ntouch started\n")
    (folder / "engine").chmod(0o755)
    room = ["sequence_parallel_size=1", "memory.device=1MiB"]  # less than the states
    done = run(folder, "rehearse", *room, code=3, ULYSSES_ENGINE=str(folder / "engine"))
    sentence = done.stderr.strip()
    assert done.stdout == "" and len(sentence.splitlines()) == 1
    assert f"will not fit: {sentence}" in run(folder, "plan", *room).stdout
    assert not (folder / "started").exists()


@pytest.mark.parametrize("arguments, said", [
    (["--profile", "trace.json"], "ulysses rehearse: --profile and --dump are for training"),
    (["--num_gpus", "3", "sequence_parallel_size=2"], "expected a divisor of 3 ranks, found 2"),
    (["memory.device=7MiB", "memory.disk=nowhere"], "nowhere"),
])
def test_what_must_be_changed_is_said_in_one_sentence(folder, arguments, said):
    done = run(folder, "rehearse", *arguments, code=2)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_a_rank_of_another_launchers_job_takes_part(folder):
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29873"}
    command = [str(ULYSSES), "rehearse", "run.yml", "--device", "cpu", "--json", "sequence_parallel_size=2"]
    ranks = [subprocess.Popen(command, cwd=folder, env=fixtures.environment(**place, RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, text=True) for r in range(2)]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads(said[0])["agree"] is True and said[1] == ""
