"""A rank that dies takes the others with it soon, and the run says which it was."""

import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

import fixtures

BUILD = pathlib.Path(os.environ.get("ULYSSES_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build")).resolve()
RANKS = 4


@pytest.fixture
def training(tmp_path):
    """A run of four ranks that has made its first step; it would go on for hours."""
    fixtures.tiny(tmp_path)
    command = [str(BUILD / "ulysses"), "run.yml", "--device", "cpu", "--num_gpus", str(RANKS), "epochs=1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=fixtures.environment(), stderr=subprocess.PIPE, text=True)
    metrics, began = tmp_path / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < 60, "no step within a minute"
        time.sleep(0.05)
    yield process, tmp_path
    process.kill()
    process.wait()


@pytest.mark.parametrize("rank", [0, 3])
def test_the_others_end_within_30_seconds_and_say_who_was_killed(training, rank):
    process, folder = training
    pids = fixtures.ranks_in(folder)
    assert sorted(pids) == list(range(RANKS))
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    said = process.communicate(timeout=30)[1].splitlines()
    assert time.monotonic() - began < 30 and process.returncode == 75
    assert said[-1] == f"rank {rank} (pid {pids[rank]}) was killed by signal 9 (SIGKILL); the other ranks were stopped"
    assert not [line for line in said if "failed at rank" in line or "Gloo" in line or "Traceback" in line], said[-10:]
    assert fixtures.ranks_in(folder) == {}


def test_a_stopped_rank_that_is_killed_later_is_named_all_the_same(training):
    process, folder = training
    pids = fixtures.ranks_in(folder)
    os.kill(pids[2], signal.SIGSTOP)
    time.sleep(1)
    assert process.poll() is None
    os.kill(pids[2], signal.SIGKILL)
    assert process.communicate(timeout=30)[1].splitlines()[-1].startswith(f"rank 2 (pid {pids[2]}) was killed by signal 9")


def test_metrics_of_the_steps_before_are_whole_lines(training):
    process, folder = training
    os.kill(fixtures.ranks_in(folder)[1], signal.SIGKILL)
    process.communicate(timeout=30)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines] == list(range(1, len(lines) + 1))
