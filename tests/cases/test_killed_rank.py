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


@pytest.mark.parametrize("rank", [0, 2])
def test_a_hung_rank_is_found_within_30_seconds_and_named_once(training, rank):
    """All others wait for it in a collective; none is left."""
    process, folder = training
    pids = fixtures.ranks_in(folder)
    time.sleep(3)  # all know each other
    os.kill(pids[rank], signal.SIGSTOP)
    began = time.monotonic()
    line = ""
    while "no sign of life" not in line:
        line = process.stderr.readline()
        assert line, "it ended without naming the rank"
    assert time.monotonic() - began < 30
    assert f"rank {rank} (pid {pids[rank]} on {os.uname().nodename}): no sign of life for 20 s: stopped or hung" in line
    assert "no sign of life" not in process.communicate(timeout=30)[1]
    assert process.returncode == 75 and fixtures.ranks_in(folder) == {}


def test_a_rank_that_was_stopped_for_a_moment_goes_on(training):
    process, folder = training
    for pid in fixtures.ranks_in(folder).values():  # one after the other, then all at once for longer than a rank may be silent
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)
    for sent, wait in ((signal.SIGSTOP, 25), (signal.SIGCONT, 5)):
        for pid in fixtures.ranks_in(folder).values():
            os.kill(pid, sent)
        before = (folder / "metrics.jsonl").stat().st_size
        time.sleep(wait)
    assert process.poll() is None and (folder / "metrics.jsonl").stat().st_size > before


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
