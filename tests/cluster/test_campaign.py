"""A little of bench/faults.py: what goes wrong at a random moment ends as it should, and the run that goes on is the one that nothing happened to."""

import os
import pathlib
import random
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench"))

import faults  # noqa: E402
import machines as machines_  # noqa: E402

# What takes half a minute is in tests of its own.
SHORT = [kind for kind in faults.HERE if not kind.startswith("SIGSTOP")]
SHORT_THERE = ["kill -9 of a rank, two machines, --max_restarts", "kill -9 of the launcher, two machines", "kill -9 of a machine's sshd", "SIGTERM, two machines"]
SEED = int(os.environ.get("ULYSSES_TEST_SEED", "5"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return faults.undisturbed(tmp_path_factory.mktemp("undisturbed"))


def happens(kinds, kind, folder, *more):
    for attempt in range(20):
        place = folder / str(attempt)
        place.mkdir()
        try:
            return faults.one_event(place, kinds[kind][0], random.Random(f"{kind} {SEED} {attempt}"), *more)
        except faults.TooLate:
            continue
        except machines_.Unavailable as why:
            pytest.skip(str(why))
    raise AssertionError("each run was over before anything could happen to it")


@pytest.mark.parametrize("kind", SHORT)
def test_on_one_machine(undisturbed, tmp_path, kind):
    assert happens(faults.HERE, kind, tmp_path, undisturbed)["seconds"] < 90


@pytest.mark.parametrize("kind", SHORT_THERE)
def test_on_two_machines(undisturbed, machines, tmp_path, kind):
    assert happens(faults.THERE, kind, tmp_path, undisturbed, *machines)["seconds"] < 90
