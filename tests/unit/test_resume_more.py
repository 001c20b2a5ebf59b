"""Going on where something beside the run has changed: the size of a step, the model, the files of a state, the metrics, the room on disk."""

import json
import os
import pathlib
import subprocess

import pytest
from test_resume import CHATS, STEPS, Run, fixtures, flip, same, undisturbed  # noqa: F401 (a fixture)


@pytest.fixture
def job(tmp_path):
    return Run(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small disk at a folder of the job; unmounts it afterwards."""
    mounted = []

    def mount(name, size):
        place = tmp_path / name
        place.mkdir()
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode != 0:
            pytest.skip("only root mounts a small disk")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("before,after", [(1, 3), (3, 1)])
def test_with_steps_of_another_size_all_epochs_are_trained_whole(job, before, after):
    """Two epochs of 9 samples, whatever the steps; the learning rate goes on where it was, not up again."""
    job.run(f"gradient_accumulation_steps={before}", f"exit_iteration={6 // before}", "checkpoint.1.save_end_of_training=true")
    said = job.run(f"gradient_accumulation_steps={after}")
    metrics = job.metrics()
    assert metrics[-1]["epoch"] == 2.0 and metrics[6 // before - 1]["epoch"] == pytest.approx(6 / CHATS)
    assert len(metrics) == 6 // before + 12 // after and f"a step had {before} samples when it was saved, and has {after}" in said
    rates = [m["lr"] for m in metrics]
    assert all(b <= a for a, b in zip(rates[4:], rates[5:])), rates
    whole = job.run(f"gradient_accumulation_steps={after}", "checkpoint.0.output_dir=other", "checkpoint.1.output_dir=others", "train_log_metrics_path=others.jsonl")
    others = [json.loads(line)["lr"] for line in (job.folder / "others.jsonl").read_text().splitlines()]
    assert rates[6 // before:] == others[6 // after:], whole


def test_a_model_that_computes_otherwise_is_refused(job):
    job.run("exit_iteration_this_run=2")
    for change, what in (("rope_theta=20000.0", "its rotary embedding was"), ("rms_norm_eps=1e-3", "its epsilon of norms was")):
        config = (job.folder / "model" / "config.json").read_text()
        fixtures.config(job.folder, change)
        assert f"states/global_step_2: the state is of another model: {what}" in job.run(code=2).splitlines()[-1]
        (job.folder / "model" / "config.json").write_text(config)


def test_a_state_without_manifest_is_damaged_and_set_aside(job, undisturbed):  # noqa: F811
    job.run("exit_iteration_this_run=4")
    (job.folder / "states" / "global_step_4" / "manifest.json").unlink()
    said = job.run()
    assert "DAMAGED: states/global_step_4/manifest.json: cannot be read: not used" in said and "going on from states/global_step_2" in said
    assert "states/global_step_4 is global_step_4.damaged now" in said and 4 in job.states()
    same(job, undisturbed)


def test_a_manifest_of_other_types_is_damaged(job):
    job.run("exit_iteration_this_run=4")
    path = job.folder / "states" / "global_step_4" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": 7}))
    assert "DAMAGED: states/global_step_4/manifest.json: is not as it was written" in job.run("exit_iteration=5")


def test_the_limit_counts_no_damaged_state(job):
    job.run("exit_iteration_this_run=6")
    flip(job.folder / "states" / "global_step_6" / "rank_00000.safetensors")
    job.run("checkpoint.1.save_every_n_steps=5", "checkpoint.1.save_total_limit=2", "exit_iteration=5")
    assert job.states() == [4, 5]


def test_states_and_models_in_one_folder_are_refused(job):
    said = job.run("checkpoint.0.output_dir=./states", code=2)
    assert "states holds states and models, both as global_step_N: expected a folder for each" in said


def test_metrics_of_other_runs_stay(job):
    job.run()
    ours = job.metrics()
    job.run("epochs=3", "checkpoint.0.output_dir=out2", "checkpoint.1.output_dir=states2")
    assert job.metrics()[:STEPS] == ours and [m["iter"] for m in job.metrics()[STEPS:]] == list(range(1, 16))


def test_an_earlier_start_that_left_no_state_is_told_once(job, undisturbed):  # noqa: F811
    (job.folder / "metrics.jsonl").write_text('{"iter": 3, "of": "another run"}\n')
    os.chmod(job.folder / "metrics.jsonl", 0o600)
    process = job.start("checkpoint.1.save_every_n_steps=100", "epochs=100000")
    job.wait_for(process, lambda: len(job.metrics()) >= 4, "no step")
    for pid in job.ranks().values():
        os.kill(pid, 9)
    process.communicate()
    job.run()
    lines = job.metrics()
    assert lines[0]["of"] == "another run" and [m["iter"] for m in lines[1:]] == list(range(1, STEPS + 1))
    assert (job.folder / "metrics.jsonl").stat().st_mode & 0o777 == 0o600 and not (job.folder / "states" / "began.json").exists()


def test_what_stops_a_run_before_its_first_step_takes_nothing_back(job):
    job.run("exit_iteration_this_run=4")
    before = job.metrics()
    (job.folder / "states" / "global_step_6").write_text("in the way")
    assert "expected nothing there" in job.run("checkpoint.1.save_every_n_steps=3", code=2)
    assert job.metrics() == before


def test_a_full_disk_for_models_does_not_end_training(job, undisturbed, small_disk):  # noqa: F811
    small_disk("out", "65m")    # a model needs little more than its bytes, but 64 MiB are left to others
    said = job.run("checkpoint.0.save_every_n_steps=1", code=2)
    assert "SAVING out/global_step_" in said and "no room on disk" in said and said.splitlines()[-1].endswith("of the saves failed; see above")
    assert job.told() == undisturbed.told() and STEPS in job.states()


def test_a_full_disk_for_metrics_does_not_end_training(job, undisturbed, small_disk):  # noqa: F811
    disk = small_disk("metrics", "64k")    # sixteen pages, all but one taken: enough for a part of the lines
    with open(disk / "filler", "wb") as filler:
        filler.write(b"x" * (60 << 10))
    said = job.run("train_log_metrics_path=metrics/m.jsonl", "epochs=6", code=2)
    assert "METRICS CANNOT BE WRITTEN to metrics/m.jsonl: No space left on device; the lines are kept" in said and said.splitlines()[-1] == "metrics/m.jsonl: no room on disk for the metrics"
    assert pathlib.Path(job.folder / "out" / f"global_step_{3 * STEPS}").exists() and 3 * STEPS in job.states()


def test_a_model_that_is_missing_at_the_end_is_saved(job, undisturbed):  # noqa: F811
    job.run()
    whole = job.weights()
    for path in (job.folder / "out" / f"global_step_{STEPS}").iterdir():
        path.unlink()
    (job.folder / "out" / f"global_step_{STEPS}").rmdir()
    assert "saved out/" in job.run()
    assert all((job.weights()[name] == whole[name]).all() for name in whole)
