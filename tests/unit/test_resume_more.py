"""Going on where something beside the run has changed: the size of a step, the model, the files of a state, the metrics, the room on disk."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
import xxhash
from test_resume import CHATS, FOREVER, STEPS, ULYSSES, Run, fixtures, flip, same, undisturbed  # noqa: F401 (a fixture)


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
    assert "DAMAGED: states/global_step_4/manifest.json: is not there: not used" in said and "going on from states/global_step_2" in said
    assert "states/global_step_4 is global_step_4.damaged now" in said and 4 in job.states()
    same(job, undisturbed)


def test_a_manifest_of_other_types_is_damaged(job):
    job.run("exit_iteration_this_run=4")
    path = job.folder / "states" / "global_step_4" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": 7}))
    assert "DAMAGED: states/global_step_4/manifest.json: is not as it was written" in job.run("exit_iteration=5")


@pytest.mark.parametrize("error,code,sentence", [("EMFILE", 75, "cannot be read: Too many open files"), ("EIO", 75, "cannot be read: Input/output error"), ("ESTALE", 75, "cannot be read: Stale file handle"),
                                                 ("EACCES", 2, "cannot be read: Permission denied")])
def test_a_state_that_cannot_be_read_now_is_no_damaged_one(job, undisturbed, error, code, sentence):  # noqa: F811
    """A shard, a manifest, or the folder: nothing is renamed, and no older state is used; when it can be read again, it is."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    job.run("exit_iteration_this_run=4")
    states = job.folder / "states"
    paths = states / "global_step_4" / "rank_00000.safetensors", states / "global_step_4" / "manifest.json", states
    for path in paths if error == "EMFILE" else paths[:1]:
        done = subprocess.run(["strace", "-f", "-o", "/dev/null", "-e", "trace=openat", "-e", f"inject=openat:error={error}", "-P", path, ULYSSES, "run.yml", "--device", "cpu", f"checkpoint.1.output_dir={states}"],
                              cwd=job.folder, env=fixtures.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == code and f"{path}: {sentence}" in done.stderr, done.stderr
        assert "DAMAGED" not in done.stderr and job.states() == [2, 4] and not list(states.glob("*.damaged"))
    job.run()
    same(job, undisturbed)


def test_latest_that_is_a_folder_is_said(job):
    job.run("exit_iteration_this_run=2")
    (job.folder / "states" / "latest").unlink()
    (job.folder / "states" / "latest").mkdir()
    assert job.run(code=2).splitlines()[-1] == "states/latest: cannot be read: Is a directory: expected a file with the name of a state: remove it"


def test_a_file_in_the_place_of_the_folder_is_said(job):
    (job.folder / "states").touch()
    assert job.run(code=2).splitlines()[-1] == "states: expected a folder, found a file"


def test_a_run_begun_anew_mixes_with_no_other(job):
    job.run("exit_iteration_this_run=4")
    before = {path: path.stat().st_mtime_ns for path in (job.folder / "states").rglob("*.safetensors")}
    said = job.run("checkpoint.1.auto_resume=false", "checkpoint.1.save_total_limit=1", code=2)
    assert said.splitlines()[-1] == (
        "states: holds 2 states of another run (global_step_4): expected none of others; move them away or choose another output_dir, or go on from them with auto_resume: true")
    assert {path: path.stat().st_mtime_ns for path in (job.folder / "states").rglob("*.safetensors")} == before and len(job.metrics()) == 4
    # A state of elsewhere is as little this run's as one that goes on; an entry that nothing goes on from is, with what this run saved there.
    job.run("checkpoint.1.output_dir=elsewhere", "exit_iteration_this_run=2", "train_log_metrics_path=elsewhere.jsonl")
    shutil.move(job.folder / "elsewhere" / "global_step_2", job.folder / "states" / "global_step_3")
    assert "states: holds 1 states of another run (global_step_3): expected none of others; move them away or choose another output_dir" in job.run(code=2)
    shutil.rmtree(job.folder / "states" / "global_step_3")
    both = job.folder.joinpath("run.yml").read_text().replace("  - {output_dir: states,", "  - {output_dir: every, save_every_n_steps: 1}\n  - {output_dir: states,")
    job.folder.joinpath("run.yml").write_text(both)
    job.run("exit_iteration_this_run=2")
    job.run("exit_iteration_this_run=2")
    assert sorted(path.name for path in (job.folder / "every").glob("global*")) == [f"global_step_{step}" for step in (5, 6, 7, 8)]


def test_states_without_a_runs_name_are_one_runs(job, undisturbed):  # noqa: F811
    job.run("exit_iteration_this_run=4")
    for path in (job.folder / "states").glob("*/manifest.json"):
        state = json.loads(path.read_text())
        del state["run"], state["digest"]
        path.write_text(json.dumps(state | {"digest": xxhash.xxh3_64_hexdigest(json.dumps(state, separators=(",", ":"), ensure_ascii=False).encode())}))
    job.run()
    same(job, undisturbed)


def test_two_runs_in_one_folder_are_noticed(job, request):
    first = job.start(*FOREVER)
    request.addfinalizer(first.kill)
    job.wait_for(first, lambda: len(job.metrics()) >= 1, "no step")
    rank = job.ranks()[0]
    said = job.run(code=2).splitlines()[-1]
    assert said.startswith(f"states: in use by another run (pid {rank} on ") and said.endswith("): wait until it has ended, or choose another output_dir")
    said = job.run("checkpoint.1.output_dir=others", code=2).splitlines()[-1]
    assert said == "train_log_metrics_path (run.yml:18): metrics.jsonl is in use by another run: wait until it has ended, or choose another file"
    assert first.poll() is None
    for pid in job.ranks().values():
        os.kill(pid, signal.SIGKILL)
    first.communicate(timeout=60)
    job.run("exit_iteration_this_run=1")    # a lock dies with its process
    iters = [m["iter"] for m in job.metrics()]
    assert iters == list(range(1, len(iters) + 1))


def test_a_run_waits_for_one_that_ends(job):
    """A requeued job beside one that is about to end."""
    first = job.start(*FOREVER)
    job.wait_for(first, lambda: len(job.metrics()) >= 1, "no step")
    second = job.start("exit_iteration_this_run=1")
    job.wait_for(second, lambda: len(fixtures.processes_in(job.folder, "ulysses-engine")) == 4, "no ranks")
    time.sleep(2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 85
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0 and "going on from" in said, said


def test_two_entries_for_states_in_one_folder_are_refused(job):
    job.folder.joinpath("run.yml").write_text(job.folder.joinpath("run.yml").read_text().replace("  - {output_dir: states,", "  - {output_dir: ./states, save_every_n_steps: 1}\n  - {output_dir: states,"))
    assert "checkpoint.2.output_dir: states is another entry's folder for states too: expected one entry, or a folder for each" in job.run(code=2)


def test_of_a_list_that_changed_the_key_is_said(job):
    job.run("exit_iteration_this_run=2")
    said = job.run("checkpoint.1.save_total_limit=7", "exit_iteration_this_run=2")
    assert [line for line in said.splitlines() if line.startswith("changed since")] == ["changed since global_step_2: checkpoint.1.save_total_limit: 0 -> 7"]


def test_a_key_without_effect_changes_no_order(job):
    job.run("exit_iteration_this_run=2")
    assert "changed since global_step_2: data.drop_last: false -> true" in job.run("data.drop_last=true", "exit_iteration_this_run=1")
    assert "data.drop_last was true when it was saved" not in job.run("data.pack_samples=true", code=2)


def test_what_is_moved_away_during_a_run_is_made_anew(job):
    process = job.start("epochs=60", "checkpoint.1.save_every_n_steps=150")
    job.wait_for(process, lambda: 150 in job.states(), "no state")
    (job.folder / "metrics.jsonl").rename(job.folder / "old.jsonl")
    (job.folder / "states").rename(job.folder / "gone")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and said.count("states is gone: made anew") == 1, said
    old, new = ([json.loads(line)["iter"] for line in (job.folder / name).read_text().splitlines()] for name in ("old.jsonl", "metrics.jsonl"))
    assert old + new == list(range(1, 301)) and new and job.states() == [300]


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
