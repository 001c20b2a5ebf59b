"""Where things lie changes no bit: training with host memory and disk, as the plan uses them for recipe keys, against all in one place."""

import pytest
import tiers

RANKS = [["sequence_parallel_size=1"], ["sequence_parallel_size=2"]]
TYPES = [["model.dtype=bf16"], ["model.dtype=bf16", "memory.master_weights=split"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiers")
    tiers.make_job(folder)
    return folder


@pytest.fixture(scope="module")
def resident(folder):
    """Of a recipe's changes: the run with all in one place, and the longest micro-batch it has."""
    known = {}

    def of(*changes):
        if changes not in known:
            steps, weights, said = tiers.train(folder, *changes)
            assert "states " not in said and "on the host" not in said and "rebuilt" not in said
            assert len({tokens for _, _, tokens in steps}) > 1 and len(set(weights.values())) == tiers.NUM_STEPS
            known[changes] = steps, weights, tiers.longest_micro_batch(said)
        return known[changes]

    return of


@pytest.mark.parametrize("ranks", RANKS, ids=["1", "2"])
@pytest.mark.parametrize("way", tiers.WAYS)
def test_every_tier_gives_the_bits_of_all_in_one_place(folder, resident, way, ranks):
    steps, weights, longest = resident(*ranks)
    assert tiers.train(folder, *ranks, *tiers.room_for(folder, ranks, longest, way))[:2] == (steps, weights)


@pytest.mark.parametrize("kind", TYPES, ids=["bf16", "split"])
@pytest.mark.parametrize("way", ["layers on both", "optimizer and gradients on the host, updated there", "optimizer on the disk"])
def test_so_do_weights_of_two_bytes(folder, resident, way, kind):
    changes = [*RANKS[1], *kind]
    steps, weights, longest = resident(*changes)
    assert tiers.train(folder, *changes, *tiers.room_for(folder, changes, longest, way))[:2] == (steps, weights)


def test_updates_that_wait_are_made_before_saving_at_the_end_only(folder, resident):
    """Without saves on the way every update runs under the next step's forward, but for the last."""
    steps, weights, longest = resident(*RANKS[1])
    tiers.clear(folder)
    tiers.run(folder, *RANKS[1], *tiers.room_for(folder, RANKS[1], longest, "optimizer on the disk"), "checkpoint.save_every_n_steps=0")
    assert tiers.saved(folder) == {f"global_step_{tiers.NUM_STEPS}": weights[f"global_step_{tiers.NUM_STEPS}"]}
