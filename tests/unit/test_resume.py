"""A run that was stopped, killed or cut off goes on as if it had not been."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

import fixtures  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"
RECIPE = fixtures.RECIPE.replace("checkpoint:\n  type: huggingface\n  output_dir: out\n  save_end_of_training: true\n", """\
checkpoint:
  - {type: huggingface, output_dir: out, save_end_of_training: true}
  - {output_dir: states, save_every_n_steps: 2, auto_resume: true}
epochs: 2
gradient_accumulation_steps: 2
scheduler: {name: cosine, warmup_ratio: 0.2}
""")
CHATS = 9    # an epoch's last step is a smaller one
STEPS = 10
FOREVER = ("epochs=1000000",)


class Run:
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        fixtures.tiny(folder, CHATS)
        (folder / "run.yml").write_text(RECIPE)

    def start(self, *arguments, verb="train", umask=-1, **environment):
        command = [str(ULYSSES), verb, "run.yml", *fixtures.ON_DEVICE, *map(str, arguments)]
        return subprocess.Popen(command, cwd=self.folder, env=fixtures.environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, umask=umask)

    def run(self, *arguments, code=0, **environment):
        process = self.start(*arguments, **environment)
        out, error = process.communicate(timeout=180)
        assert process.returncode == code, (process.returncode, error)
        return error

    def metrics(self):
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def told(self):
        """What does not depend on the clock."""
        return [tuple(m[key] for key in ("iter", "epoch", "loss", "grad_norm", "lr", "seqlen", "tokens", "trained_tokens")) for m in self.metrics()]

    def weights(self, step=STEPS):
        return fixtures.read_weights(self.folder / "out" / f"global_step_{step}")

    def states(self):
        return sorted(int(path.name[12:]) for path in (self.folder / "states").glob("global_step_*[0-9]"))

    def wait_for(self, process, done, what):
        began = time.monotonic()
        while not done():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < 120, what
            time.sleep(0.02)

    def ranks(self):
        return fixtures.ranks_in(self.folder)


@pytest.fixture
def job(tmp_path):
    return Run(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    whole = Run(tmp_path_factory.mktemp("undisturbed"))
    whole.run()
    assert len(whole.told()) == STEPS
    return whole


def same(run, undisturbed):
    assert run.told() == undisturbed.told()
    ours, theirs = run.weights(), undisturbed.weights()
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("every", [1, 3, 5])    # 5: an epoch
def test_stopped_again_and_again_it_is_the_run_that_never_stopped(job, undisturbed, every):
    for step in range(every, STEPS + every, every):
        said = job.run(f"exit_iteration_this_run={every}", "checkpoint.1.save_end_of_training=true")
        assert ("going on from" in said) == (step > every)
    assert [m["iter"] for m in job.metrics()] == list(range(1, STEPS + 1))
    same(job, undisturbed)
    said = job.run()    # nothing is left to do
    same(job, undisturbed)


def test_killed_it_goes_on_from_the_last_save_and_tells_no_step_twice(job, undisturbed):
    process = job.start()
    job.wait_for(process, lambda: 4 in job.states() and len(job.metrics()) >= 5, "no save")
    for pid in job.ranks().values():
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 75
    (job.folder / "states" / "global_step_8.incomplete").mkdir(exist_ok=True)    # as a save that was cut off leaves it
    with open(job.folder / "metrics.jsonl", "a") as file:
        file.write('{"iter": 99, "lo')
    said = job.run()
    assert re.search(r"going on from states/global_step_\d+: step \d+, \d+ samples seen", said)
    same(job, undisturbed)
    assert not list((job.folder / "states").glob("*.incomplete"))


def test_started_again_it_goes_on_by_itself(job, undisturbed):
    """Killed before the first save and after one."""
    process = job.start("--max_restarts", 2)
    killed = set()
    for steps in (1, 5):
        job.wait_for(process, lambda: len(job.metrics()) >= steps and len(job.ranks()) == 2 and not killed & set(job.ranks().values()), "no step")
        pid = job.ranks()[1]
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    lines = [line for line in said.splitlines() if line.startswith(("restart ", "going on from")) or "was killed by signal 9" in line]
    assert [line.split(" (pid")[0] for line in lines if "going on" not in line] == [
        "rank 1", "restart 1 of 2, in 1 s, from the newest state that is whole", "rank 1", "restart 2 of 2, in 2 s, from the newest state that is whole"]
    assert "going on from states/global_step_" in lines[-1]
    same(job, undisturbed)


def test_it_is_not_started_again_more_often_or_after_what_a_start_cannot_mend(job):
    for more, code, ends in (((), 75, lambda process: os.kill(job.ranks()[0], signal.SIGKILL)), (FOREVER, 85, lambda process: process.send_signal(signal.SIGTERM)),
                             ((*FOREVER, "checkpoint.1.output_dir=other", "checkpoint.1.auto_resume=false"), 2, None)):
        (job.folder / "metrics.jsonl").unlink(missing_ok=True)
        process = job.start("--max_restarts", 1 if code != 75 else 0, *more)
        if ends:
            job.wait_for(process, lambda: len(job.metrics()) >= 1 and len(job.ranks()) == 2, "no step")
            ends(process)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code and "restart " not in said, said
    assert said.splitlines()[-1].startswith("--max_restarts (run.yml:12): expected a state to go on from: checkpoint: [{type: deepspeed")
    assert "expected no --restart-data" in job.run("--max_restarts", 1, "--restart-data", code=2)


@pytest.mark.parametrize("sent,whom", [(signal.SIGTERM, "launcher"), (signal.SIGINT, "launcher"), (signal.SIGUSR1, 0), (signal.SIGTERM, 1)])
def test_asked_to_stop_it_saves_and_ends_with_85(job, undisturbed, sent, whom):
    process = job.start()
    job.wait_for(process, lambda: len(job.metrics()) >= 1, "no step")
    os.kill(process.pid if whom == "launcher" else job.ranks()[whom], sent)
    _, said = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was through before the signal came")
    assert process.returncode == 85, said
    steps = len(job.metrics())
    assert f"signal {int(sent)}: stopping after step {steps}" in said and steps in job.states()
    job.run()
    same(job, undisturbed)


def test_a_signal_to_every_process_of_the_job_is_one_wish(job):
    """As systemd, SLURM's time limit and `timeout` send it: some get it twice, from there and from the launcher."""
    process = job.start(*FOREVER, "checkpoint.1.save_every_n_steps=0")
    job.wait_for(process, lambda: len(job.metrics()) >= 1 and len(job.ranks()) == 2, "no step")
    for pid in (process.pid, *job.ranks().values(), process.pid):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.05)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85 and len(job.metrics()) in job.states(), said


def test_asked_to_stop_while_data_are_prepared_it_ends_with_85_too(job):
    (job.folder / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (job.folder / "python").chmod(0o755)
    process = job.start(ULYSSES_PYTHON=str(job.folder / "python"))
    job.wait_for(process, lambda: fixtures.processes_in(job.folder, "sleep"), "nothing is prepared")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 85 and said.splitlines()[-1] == "stopped before the first step; start again"
    began = time.monotonic()
    while fixtures.processes_in(job.folder, ""):
        assert time.monotonic() - began < 10
        time.sleep(0.05)


def test_asked_to_stop_while_it_evaluates_it_goes_on_from_there(job, tmp_path_factory):
    evaluates = ("eval_interval=1", "data.train_eval_split=[0.6, 0.4]")
    whole = Run(tmp_path_factory.mktemp("evaluates"))
    whole.run(*evaluates)
    steps = [m["iter"] for m in whole.metrics()]
    assert [m["iter"] for m in whole.metrics() if "eval_loss" in m] == sorted(set(steps))
    process = job.start(*evaluates)
    job.wait_for(process, lambda: len(job.metrics()) >= 3, "no step")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 85), said
    job.run(*evaluates)
    key = lambda m: (m["iter"], m.get("loss"), m.get("eval_loss"))    # noqa: E731
    assert [key(m) for m in job.metrics()] == [key(m) for m in whole.metrics()]


def test_asked_to_stop_while_it_loads_it_ends_with_85_too(job, undisturbed):
    """Each rank at whatever it is doing: its libraries are being loaded, it looks for the others, it reads weights."""
    for wait in (0, 0.1, 0.3, 0.6):
        process = job.start()
        job.wait_for(process, lambda: len(job.ranks()) == 2, "no ranks")
        time.sleep(wait)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (0, 85), said
    job.run()
    same(job, undisturbed)


def test_a_rank_that_stops_before_its_first_sign_of_life_is_named(tmp_path):
    """In two runs at a time, as it takes a while: the first rank, the second."""
    jobs = [Run(tmp_path / str(rank)) for rank in range(2)]
    processes = [job.start(verb="rehearse", ULYSSES_SILENCE="1") for job in jobs]
    for rank, (job, process) in enumerate(zip(jobs, processes)):
        job.wait_for(process, lambda job=job, rank=rank: rank in job.ranks(), "no ranks")
        os.kill(job.ranks()[rank], signal.SIGSTOP)    # its libraries are being loaded
    began = time.monotonic()
    for rank, (job, process) in enumerate(zip(jobs, processes)):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75 and 4 < time.monotonic() - began < 30, said
        assert len([line for line in said.splitlines() if f"rank {rank}: no sign of life in the 6 s since the start" in line]) == 1, said
        assert job.ranks() == {}


@pytest.mark.parametrize("node", [0, 1])
def test_asked_to_stop_while_it_waits_for_another_machine_it_ends_with_85(job, node):
    (job.folder / "hosts").write_text("here slots=1\nnever-started slots=1\n")
    process = job.start("-H", "hosts", "--no_ssh", "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", 23581 + node)
    job.wait_for(process, lambda: node in job.ranks(), "no rank")
    time.sleep(2)    # it has loaded its libraries and waits
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85 and time.monotonic() - began < 30 and "stopped before the first step; start again" in said, said


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as at:
        return at.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_asked_to_stop_while_all_load_ends_all_at_once(job, rank):
    for wait in (0, 0.4):
        process = job.start(*FOREVER)
        job.wait_for(process, lambda: len(job.ranks()) == 2, "no ranks")
        time.sleep(wait)
        os.kill(job.ranks()[rank], signal.SIGTERM)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 85 and time.monotonic() - began < 30 and "stopp" in said, said


@pytest.mark.parametrize("rank, waits", [(1, (0, 0.1, 0.25, 0.4, 0.6)), (0, (0.1, 0.4))])
def test_one_rank_of_another_launcher_asked_to_stop_before_the_first_step_ends_all(job, rank, waits):
    """Whatever it is: `ulysses` that prepares, or the engine that loads its libraries."""
    job.run("exit_iteration_this_run=1")    # the data are prepared
    for wait in waits:
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [job.start(*FOREVER, "checkpoint.1.save_every_n_steps=0", RANK=str(r), LOCAL_RANK=str(r), **place) for r in range(2)]
        time.sleep(0.05 + wait)
        ranks[rank].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=30)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [85, 85], (wait, said)


def test_one_that_waits_and_one_that_is_stopped_end_too(job):
    process = job.start(*FOREVER)
    job.wait_for(process, lambda: len(job.ranks()) == 2, "no ranks")
    os.kill(job.ranks()[1], signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=40)
    assert process.returncode == 85 and said.splitlines()[-1] == "stopped before the first step; start again" and job.ranks() == {}, said


def test_files_are_made_with_the_users_umask(job):
    process = job.start("exit_iteration_this_run=2", "data.cache_dir=fresh", umask=0o027)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    made = [path for path in job.folder.rglob("*") if path.relative_to(job.folder).parts[0] in ("fresh", "states", "metrics.jsonl")]
    assert len(made) > 8 and all(path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640) for path in made), [(path, oct(path.stat().st_mode)) for path in made]


def test_without_standard_streams_it_trains(job):
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>said', "sh", str(ULYSSES), "run.yml", "--device", "cpu", "exit_iteration=2"], cwd=job.folder, env=fixtures.environment(), timeout=60)
    said = (job.folder / "said").read_text()
    assert done.returncode == 0 and "Train iter" in said and "Traceback" not in said, said
    python = [str(ULYSSES.parents[1] / ".venv" / "bin" / "python"), "-m", "ulysses_plus.prepare", "--request", "nothing"]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>said', "sh", *python], cwd=job.folder, env=fixtures.environment(PYTHONPATH=str(ROOT / "python")), timeout=60)
    assert done.returncode == 2 and "Traceback" not in (job.folder / "said").read_text()


def test_a_port_in_use_is_said_with_the_way_to_another(job):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = job.run("--master_port", port, code=2, verb="rehearse")
        assert said.splitlines()[-1] == f"port {port} at 127.0.0.1 is in use by another program; choose another with --master_port"
        said = job.run(code=2, verb="rehearse", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        assert said.splitlines()[-1] == f"port {port} at 127.0.0.1 is in use by another program; choose another by the environment variable MASTER_PORT, the same for all ranks"


def test_a_second_signal_ends_it_at_once(job):
    process = job.start(*FOREVER, "checkpoint.1.save_every_n_steps=0")
    job.wait_for(process, lambda: len(job.metrics()) >= 1, "no step")
    for pid in job.ranks().values():
        os.kill(pid, signal.SIGSTOP)    # they cannot come to the end of a step
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and job.ranks() == {}


def test_the_kill_switch_and_the_clock_stop_it_too(job, undisturbed):
    (job.folder / "stop").touch()
    assert job.run(code=85).splitlines()[-1] == "stop exists: stopping before the first step"
    (job.folder / "stop").unlink()
    assert job.run("exit_after=0.001", code=85).splitlines()[-1] == "exit_after: 0.0s have passed: stopping before the first step"
    assert job.metrics() == []
    process = job.start(*FOREVER, "checkpoint.1.save_every_n_steps=0")
    job.wait_for(process, lambda: len(job.metrics()) >= 1, "no step")
    (job.folder / "stop").touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85 and f"stop exists: stopping after step {len(job.metrics())}" in said, said
    (job.folder / "stop").unlink()
    shutil.rmtree(job.folder / "states")
    (job.folder / "metrics.jsonl").unlink()
    job.run()
    same(job, undisturbed)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("by", ["the kill switch", "the clock"])
def test_the_kill_switch_and_the_clock_end_what_prepares(job, by, others):
    """Also where another launcher has started the ranks."""
    (job.folder / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (job.folder / "python").chmod(0o755)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **place} for rank in range(2)] if others else [{}]
    ranks = [job.start(*(["exit_after=2"] if by == "the clock" else []), ULYSSES_PYTHON=str(job.folder / "python"), **more) for more in places]
    began = time.monotonic()
    job.wait_for(ranks[0], lambda: fixtures.processes_in(job.folder, "sleep"), "nothing is prepared")
    if by == "the kill switch":
        (job.folder / "stop").touch()
    said = [process.communicate(timeout=30)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [85] * len(ranks) and time.monotonic() - began < 30, said
    assert ("stop exists" if by == "the kill switch" else "exit_after: 2.0s have passed") + ": stopping before the first step" in said[0].splitlines()
    began = time.monotonic()
    while fixtures.processes_in(job.folder, ""):
        assert time.monotonic() - began < 30
        time.sleep(0.05)


def test_exit_after_counts_from_the_start_of_ulysses(job):
    """What prepares takes two seconds of it."""
    python = os.environ.get("ULYSSES_PYTHON", str(ULYSSES.parents[1] / ".venv" / "bin" / "python"))
    (job.folder / "python").write_text(f'#!/bin/sh\nsleep 2\nexec {python} "$@"\n')
    (job.folder / "python").chmod(0o755)
    began = time.monotonic()
    said = job.run(*FOREVER, "exit_after=8", "checkpoint.1.save_every_n_steps=0", code=85, ULYSSES_PYTHON=str(job.folder / "python"))
    assert 7.5 < time.monotonic() - began < 14 and "exit_after: 8.0s have passed: stopping after step" in said, said


def test_where_no_state_is_saved_the_kill_switch_ends_as_training_does(job):
    (job.folder / "stop").touch()
    assert job.run("checkpoint.1.enabled=false").splitlines()[-1] == "stop exists: stopping before the first step"
    (job.folder / "stop").unlink()
    process = job.start("epochs=1000", "checkpoint.1.enabled=false")
    job.wait_for(process, lambda: len(job.metrics()) >= 1, "no step")
    (job.folder / "stop").touch()
    _, said = process.communicate(timeout=60)
    steps = len(job.metrics())
    assert process.returncode == 0 and "no state is saved on the way: an interruption loses all" in said and f"stopping after step {steps}" in said, said
    assert job.weights(steps)


def meshes():
    """Ranks, of how many a sequence, micro-batches a step: two samples a step in each."""
    return {(1, 1): 2, (2, 2): 2, (4, 2): 1, (4, 4): 2}


def pairs():
    """All with ULYSSES_ALL_TESTS=1; else each mesh once on either side."""
    if os.environ.get("ULYSSES_ALL_TESTS"):
        return [(first, then) for first in meshes() for then in meshes()]
    return [((1, 1), (4, 4)), ((2, 2), (1, 1)), ((4, 2), (2, 2)), ((4, 4), (4, 2))]


@pytest.mark.parametrize("first,then", pairs())
def test_saved_on_some_ranks_it_goes_on_with_others(job, undisturbed, first, then):
    def mesh(of):
        return "--num_gpus", of[0], f"sequence_parallel_size={of[1]}", f"gradient_accumulation_steps={meshes()[of]}"

    job.run(*mesh(first), "exit_iteration_this_run=4")
    said = job.run(*mesh(then))
    assert "going on from states/global_step_4: step 4, 8 samples seen" in said
    ours, theirs = job.metrics(), undisturbed.metrics()
    assert [(m["iter"], m["tokens"], m["trained_tokens"], m["lr"]) for m in ours] == [(m["iter"], m["tokens"], m["trained_tokens"], m["lr"]) for m in theirs]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([m[key] for m in ours], [m[key] for m in theirs], rtol=1e-5)


def test_split_masters_go_on_bit_by_bit(job):
    more = ("model.dtype=bf16", "memory.master_weights=split")
    job.run(*more)
    model = job.folder / "out" / f"global_step_{STEPS}" / "model.safetensors"
    whole = job.told(), model.read_bytes()
    shutil.rmtree(job.folder / "states"), shutil.rmtree(job.folder / "out"), (job.folder / "metrics.jsonl").unlink()
    job.run(*more, "exit_iteration_this_run=4")
    job.run(*more)
    assert job.told() == whole[0] and model.read_bytes() == whole[1]


def flip(path, at=-100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_state_is_known_and_the_one_before_is_used(job, undisturbed):
    job.run("exit_iteration_this_run=6")
    assert job.states() == [2, 4, 6]
    flip(job.folder / "states" / "global_step_6" / "rank_00001.safetensors")
    (job.folder / "states" / "global_step_4" / "manifest.json").write_text("{")
    said = job.run()
    assert "DAMAGED: states/global_step_6/rank_00001.safetensors: tensor '" in said and "is not as it was written: not used" in said
    assert "DAMAGED: states/global_step_4/manifest.json" in said and "going on from states/global_step_2" in said
    same(job, undisturbed)


def test_where_all_are_damaged_it_says_so(job):
    job.run("exit_iteration_this_run=2")
    flip(job.folder / "states" / "global_step_2" / "rank_00000.safetensors")
    assert job.run(code=2).splitlines()[-1] == "states: none of the 1 states there is whole: move them away to begin anew"


def test_a_changed_recipe_is_compared(job):
    job.run("exit_iteration_this_run=2")
    assert "changed since global_step_2: optimizer.learning_rate: 0.001 -> 0.002" in job.run("optimizer.learning_rate=2e-3", "exit_iteration=3")
    said = job.run("data.max_length=96", code=2).splitlines()[-1]
    assert said == "states/global_step_2: data.max_length was 128 when it was saved, the recipe says 96: which samples have been seen is not known then; expected the same, or --restart-data to begin the data anew"
    assert "expected the same; begin a new run in another output_dir" in job.run("model.dtype=bf16", code=2)
    fixtures.chats(job.folder, CHATS + 2)
    assert f"the data had {CHATS} samples when it was saved, and has {CHATS + 2}" in job.run(code=2)
    fixtures.chats(job.folder, CHATS)
    lines = (job.folder / "chats.jsonl").read_text().splitlines()
    (job.folder / "chats.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert job.run(code=2).splitlines()[-1] == (
        "states/global_step_2: the data are not those that it was saved with, though as many: which samples have been seen is not known then; expected the same tokens, or --restart-data to begin the data anew")
    said = job.run("--restart-data", "data.max_length=96", "exit_iteration=4")
    assert "the data begins anew" in said and [m["iter"] for m in job.metrics()] == [1, 2, 3, 4]


def test_another_models_state_is_refused(job):
    job.run("exit_iteration_this_run=2")
    fixtures.config(job.folder, "num_hidden_layers=1")
    assert job.run(code=2).splitlines()[-1] == "states/global_step_2: the state is of another model: layer 1 has 9,344 elements there, head 10,304 in the recipe's"


def test_only_so_many_are_kept(job):
    job.run("checkpoint.1.save_total_limit=2", "checkpoint.1.save_every_n_steps=1", "exit_iteration=5")
    assert job.states() == [4, 5] and (job.folder / "states" / "latest").read_text() == "global_step_5\n"


def test_a_full_disk_does_not_end_training(job, undisturbed):
    small = job.folder / "states"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small], capture_output=True).returncode != 0:
        pytest.skip("only root mounts a small disk")
    try:
        # One state fits, two do not.
        said = job.run("checkpoint.1.auto_resume=false", code=2)
        assert "SAVING states/global_step_4 FAILED: " in said and "no room on disk" in said
        assert said.splitlines()[-1].endswith("of the saves failed; see above")
        assert job.told() == undisturbed.told() and job.states() == [2]
        assert not list(small.glob("*.incomplete"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_export_is_what_saving_a_model_gives(job):
    job.run("checkpoint.1.save_end_of_training=true")
    done = subprocess.run([str(ULYSSES), "export", "run.yml"], cwd=job.folder, env=fixtures.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, saved = fixtures.read_weights(job.folder / "states" / f"global_step_{STEPS}-huggingface"), job.weights()
    assert ours.keys() == saved.keys() and all(np.array_equal(ours[name], saved[name]) for name in saved)
    assert (job.folder / "states" / f"global_step_{STEPS}-huggingface" / "tokenizer.json").exists()
    done = subprocess.run([str(ULYSSES), "export", "run.yml", "checkpoint.1.output_dir=nowhere"], cwd=job.folder, env=fixtures.environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "nowhere: expected a saved state (global_step_N), found none\n"
