"""Every recipe that comes with the program is planned: quickly, without a network, in facts that fit together."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

import fixtures  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))


def plan(path, *arguments):
    # The demo makes its own model; any folder stands for it.
    model = [f"model.name_or_path={fixtures.shared() / 'model'}"] if path.name == "demo-recall.yml" else []
    began = time.monotonic()
    done = subprocess.run([str(ULYSSES), "plan", str(path), *model, *arguments], env=fixtures.environment(), capture_output=True, text=True, timeout=30)
    return done, time.monotonic() - began


def test_there_are_recipes():
    assert len(RECIPES) > 40


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_is_made_at_once_and_its_facts_fit_together(path, device):
    done, seconds = plan(path, "--json", "--device", device, *(["model.dtype=bf16"] if device == "cuda" else []))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert seconds < 2    # less than half of it on a machine that does nothing else
    facts = json.loads(done.stdout)
    mesh, sequence, heads, tokens = facts["mesh"], facts["sequence"], facts["heads"], facts["batch"]
    assert mesh["world"] == mesh["sequence_parallel"] * mesh["replicas"] and mesh["device"] == device
    assert sequence["shard_tokens"] * mesh["sequence_parallel"] == sequence["planned_length"] >= sequence["max_length"]
    assert len(heads["per_rank"]) == mesh["sequence_parallel"]
    assert sum(h["query"] for h in heads["per_rank"]) == heads["query"]
    assert sum(h["key_value"] for h in heads["per_rank"]) >= heads["key_value"]
    assert tokens["tokens"] == tokens["samples"] * sequence["max_length"]
    memory = facts["bytes"]
    assert memory["total"] == memory["between_steps"] + memory["within_step"] + memory["libraries"] > 0
    assert memory["alive_at_peak"] <= memory["within_step"]
    # Weights, gradients and moments of this many parameters, in equal shards.
    assert memory["between_steps"] * mesh["world"] >= facts["model"]["parameters"] * 12
    assert math.isfinite(facts["arithmetic"]["gemm_flops"]) and len(facts["hash"]) == 32


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.stem.startswith("run-sp")], ids=lambda path: path.stem)
def test_the_search_for_a_gpu_is_short_and_stays_within_its_room(path):
    facts = json.loads(plan(path, "--json", "--gpu", "H100", "model.dtype=bf16")[0].stdout)
    assert facts["pricings"]["search"] < 1500 and facts["pricings"]["longest"] < 1500    # programs that are read, a millisecond or a few each
    assert facts["fits"] == (facts["bytes"]["total"] <= facts["bytes"]["budget"])
    length, longest = facts["sequence"]["max_length"], facts["longest"]["max_length"]
    assert length <= longest * 1.02 if facts["fits"] else length > longest


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_plan_reads_as_lines_under_a_subject(path):
    done, _ = plan(path)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    subjects = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert subjects[:4] == ["model", "mesh", "sequence", "heads"] and len(subjects) == len(set(subjects))
    assert all(len(line) > 11 and line == line.rstrip() for line in lines)


@pytest.mark.parametrize("path", [p for p in RECIPES if "-sp" in p.stem], ids=lambda path: path.stem)
def test_recipes_share_a_sequence_among_as_many_ranks_as_their_names_say(path):
    facts = json.loads(plan(path, "--json")[0].stdout)
    alone = "baseline" in path.stem or "no-ulysses" in path.stem
    ranks = 1 if alone else int(path.stem.split("-sp")[1].split("-")[0])
    assert facts["mesh"]["sequence_parallel"] == ranks
