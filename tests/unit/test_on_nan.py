"""A step whose loss or gradient is not finite is not applied, on any rank; where it came from is named."""

import json
import math
import re
import subprocess

import numpy as np
import pytest

from test_resume import CHATS, STEPS, Run  # first: it says where fixtures are

import fixtures  # isort: skip
import tiers

BAD = 5    # the sample with the token whose embedding is no number
MESHES = {"alone": ("--num_gpus", 1, "sequence_parallel_size=1"), "P = 2": (), "P = 2, twice": ("--num_gpus", 4), "R = 2": ("--num_gpus", 2, "sequence_parallel_size=1")}


class Poisoned(Run):
    def __init__(self, folder):
        super().__init__(folder)
        from tokenizers import Tokenizer

        tensors = fixtures.weights()
        tensors["model.embed_tokens.weight"][Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).token_to_id("Z")] = math.nan
        fixtures.write_weights(folder / "model" / "model.safetensors", tensors)
        chats = [fixtures.conversation(i) for i in range(CHATS)]
        chats[BAD][0]["content"] += " Z"
        fixtures.rows(folder, *({"messages": chat} for chat in chats))


@pytest.fixture
def job(tmp_path):
    return Poisoned(tmp_path)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    whole = Poisoned(tmp_path_factory.mktemp("skipped"))
    whole.said = whole.run("on_nan=skip")
    return whole


@pytest.mark.parametrize("mesh", MESHES)
def test_the_step_is_not_applied_and_its_sample_is_named(job, mesh):
    said = job.run("checkpoint.1.save_every_n_steps=1000", *MESHES[mesh], code=76)
    rows = job.metrics()
    assert rows[-1]["loss"] is None and rows[-1]["grad_norm"] is None and all("not_applied" not in row for row in rows[:-1])
    step = rows[-1]["iter"]
    found = re.search(r"^step (\d+): loss is nan, gradient norm is nan, first in the output of embedding, at sample 5 of chats.jsonl \(token \d+ of \d+\)(, micro-batch [12] of 2)?; the step was not applied$", said, re.MULTILINE)
    assert found and int(found[1]) == step and len(re.findall("loss is nan", said)) == 1, said
    assert rows[-1]["not_applied"] in found[0]
    # What was learned before is saved; so the run that skips goes on from there.
    assert job.states() == ([step - 1] if step > 1 else [])
    again = job.run("on_nan=skip", *MESHES[mesh])
    assert "is nan" in again and [row["iter"] for row in job.metrics()] == list(range(1, job.metrics()[-1]["iter"] + 1))
    weights = job.weights(job.metrics()[-1]["iter"])
    assert sum(not np.isfinite(tensor).all() for tensor in weights.values()) == 1    # the embedding that was broken before


def test_skipping_is_the_run_without_that_step(job, skipped):
    """Weights, moments and bias correction are those of a run in which the step never was."""
    rows = skipped.metrics()
    assert [row["iter"] for row in rows] == list(range(1, STEPS + 1))
    bad = [row["iter"] for row in rows if "not_applied" in row]
    assert len(bad) == 2 and [row["iter"] for row in rows if row["loss"] is None] == bad    # once an epoch
    assert len(re.findall(r"; the step was not applied \((\d) so far\)", skipped.said)) == 2
    for every in (1, 3):
        for name in ("metrics.jsonl", "out", "states"):
            subprocess.run(["rm", "-rf", str(job.folder / name)], check=True)
        for _ in range(0, STEPS, every):
            job.run("on_nan=skip", f"exit_iteration_this_run={every}", "checkpoint.1.save_end_of_training=true")
        same_but_for_nan(job, skipped)


@pytest.mark.parametrize("way", ["optimizer on the host", "optimizer and gradients on the host, updated there", "optimizer on the disk"])
def test_an_update_that_waits_for_the_next_step_is_dropped_too(job, skipped, way):
    (job.folder / "scratch").mkdir()
    job.run("on_nan=skip", *tiers.room_for(job.folder, [], 128, way))
    same_but_for_nan(job, skipped)


def same_but_for_nan(run, other):
    assert run.told() == other.told()
    ours, theirs = run.weights(), other.weights()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in ours)


def test_a_skipped_step_changes_nothing(job):
    """All samples are bad: the saved model is the one that was loaded."""
    fixtures.rows(job.folder, *({"messages": [{"role": "user", "content": f"{i} Z"}, {"role": "assistant", "content": "falcon"}]} for i in range(4)))
    job.run("on_nan=skip", "epochs=1")
    steps = len(job.metrics())
    weights, before = job.weights(steps), fixtures.read_weights(job.folder / "model")
    assert all(np.array_equal(weights[name], before[name], equal_nan=True) for name in before)
    manifest = json.loads((job.folder / "states" / f"global_step_{steps}" / "manifest.json").read_text())
    assert manifest["skipped"] == steps


def test_where_only_the_gradient_is_infinite_its_layer_is_named(job):
    """The last norm's weight is 0, so that all logits are, and what its gradient is summed from too large for fp32."""
    tensors = fixtures.weights()
    tensors["model.embed_tokens.weight"][:, 0] = 10
    tensors["model.norm.weight"] = np.zeros_like(tensors["model.norm.weight"])
    head = np.full_like(tensors["lm_head.weight"], -3e38)
    head *= np.where(np.isin(np.arange(fixtures.CONFIG["vocab_size"]), labels(job)), -1, 1)[:, None]
    tensors["lm_head.weight"] = head
    fixtures.write_weights(job.folder / "model" / "model.safetensors", tensors)
    said = job.run("gradient_accumulation_steps=1", code=76)
    assert re.search(r"^step 1: loss is 5\.\d+, gradient norm is (inf|nan), first in the gradient of head, with sample \d of chats.jsonl \(token 0 of \d+\); the step was not applied$", said, re.MULTILINE), said


def labels(job):
    """Tokens of the answers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.folder / "model" / "tokenizer.json"))
    return sorted({token for answer in ("falcon<|im_end|>\n", "heron<|im_end|>\n") for token in tokenizer.encode(answer).ids})


def test_pre_empted_between_it_counts_on(job, skipped):
    job.run("on_nan=skip", "exit_iteration_this_run=6")
    job.run("on_nan=skip")
    same_but_for_nan(job, skipped)
