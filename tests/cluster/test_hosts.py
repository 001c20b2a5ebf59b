"""A job on two machines over ssh: it trains as on one, ends as a whole, and says who was first."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

import fixtures

BUILD = pathlib.Path(os.environ.get("ULYSSES_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build")).resolve()
ULYSSES = BUILD / "ulysses"


class Job:
    def __init__(self, hosts, ssh, folder):
        self.hosts, self.ssh, self.folder = hosts, ssh, folder
        fixtures.tiny(folder)
        (folder / "hostfile").write_text("".join(f"{host.address} slots=2\n" for host in hosts))

    def start(self, *arguments, hostfile="hostfile", path=None, **environment):
        command = [str(ULYSSES), "run.yml", "--device", "cpu", "-H", hostfile, "--ssh_port", str(self.hosts[0].port), *arguments]
        path = path or f"{self.ssh}/bin:{os.environ['PATH']}"
        return subprocess.Popen(command, cwd=self.folder, env=fixtures.environment(PATH=path, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments, code=0, **more):
        process = self.start(*arguments, **more)
        out, error = process.communicate(timeout=120)
        assert process.returncode == code, error
        return out, error

    def metrics(self, name="metrics.jsonl"):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_a_step(self, process):
        began = time.monotonic()
        while not self.metrics():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < 90, "no step"
            time.sleep(0.05)

    def ranks(self):
        return fixtures.ranks_in(self.folder)

    def left(self):
        """All of ours that still run in this job's folder."""
        return [int(place.name) for place in fixtures.processes_in(self.folder, "ulysses")]

    def nothing_is_left(self, seconds=30):
        began = time.monotonic()
        while self.left():
            assert time.monotonic() - began < seconds, self.left()
            time.sleep(0.1)


@pytest.fixture
def job(machines, tmp_path):
    hosts, ssh = machines
    made = Job(hosts, ssh, tmp_path)
    yield made
    for pid in made.left():
        os.kill(pid, signal.SIGKILL)


def test_four_ranks_on_two_machines_train_as_four_on_one(job):
    """P = 4 over both, then two replicas of P = 2; the environment file's variables arrive and are on no command line."""
    (job.folder / ".deepspeed_env").write_text("# a comment\n\nSECRET_OF_MINE=a b'c\"$d\n")
    for P in (4, 2):
        _, said = job.run(f"sequence_parallel_size={P}")
        several, weights = job.metrics(), fixtures.read_weights(job.folder / "out")
        for name in ("metrics.jsonl", "out"):
            (job.folder / name).rename(job.folder / f"{name}-{P}")
        one = subprocess.run([str(ULYSSES), "run.yml", "--device", "cpu", "--num_gpus", "4", f"sequence_parallel_size={P}"], cwd=job.folder, env=fixtures.environment(), capture_output=True, text=True)
        assert one.returncode == 0, one.stderr
        assert [(m["loss"], m["grad_norm"]) for m in several] == [(m["loss"], m["grad_norm"]) for m in job.metrics()]
        alone = fixtures.read_weights(job.folder / "out")
        assert all(np.array_equal(weights[name], alone[name]) for name in alone)
        for name in ("metrics.jsonl", "out"):
            (job.folder / name).rename(job.folder / f"{name}-{P}-alone")
    assert "SECRET" not in said


def test_variables_arrive_without_being_seen(job):
    (job.folder / ".deepspeed_env").write_text("# a comment\n\nSECRET_OF_MINE=a b'c\"$d\n")
    process = job.start("sequence_parallel_size=4", "epochs=100000", WANDB_API_KEY="hidden-key")
    job.wait_for_a_step(process)
    for rank, pid in job.ranks().items():
        environment = dict(entry.split("=", 1) for entry in pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0") if entry)
        assert environment["SECRET_OF_MINE"] == "a b'c\"$d" and environment["WANDB_API_KEY"] == "hidden-key"
        assert environment["WORLD_SIZE"] == "4" and environment["LOCAL_RANK"] == str(rank % 2) and environment["CROSS_RANK"] == str(rank // 2)
        assert environment["MASTER_ADDR"] == job.hosts[0].address
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            seen = (place / "cmdline").read_bytes()
        except OSError:
            continue
        assert b"hidden-key" not in seen and b"c\"$d" not in seen
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    job.nothing_is_left()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_killed_rank_ends_all_and_is_named_once(job, rank):
    process = job.start("sequence_parallel_size=4", "epochs=100000")
    job.wait_for_a_step(process)
    pids = job.ranks()
    assert sorted(pids) == [0, 1, 2, 3]
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - began < 30
    lines = said.splitlines()
    assert len([line for line in lines if "was killed by signal 9" in line]) == 1 and f"rank {rank} (pid {pids[rank]})" in said
    assert lines[-1] == f"{job.hosts[rank // 2].address}: ended with exit code 75; the other machines' ranks were stopped"
    assert not [line for line in lines if "failed at rank" in line or "Gloo" in line], lines[-10:]
    job.nothing_is_left()


def test_a_killed_leader_leaves_nothing_behind(job):
    process = job.start("sequence_parallel_size=4", "epochs=100000")
    job.wait_for_a_step(process)
    process.kill()
    process.communicate()
    job.nothing_is_left()


def test_a_machine_that_cannot_be_reached_any_more_is_named(job):
    process = job.start("sequence_parallel_size=4", "epochs=100000")
    job.wait_for_a_step(process)
    job.hosts[1].link(False)
    try:
        began = time.monotonic()
        _, said = process.communicate(timeout=90)
        assert process.returncode == 75 and time.monotonic() - began < 45
        assert said.splitlines()[-1] == f"{job.hosts[1].address}: the connection was lost; the other machines' ranks were stopped"
        job.nothing_is_left(60)
    finally:
        job.hosts[1].link(True)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_hung_rank_ends_all_and_is_named_once_with_its_machine(job, rank):
    process = job.start("sequence_parallel_size=4", "epochs=100000", ULYSSES_SILENCE="6")
    job.wait_for_a_step(process)
    pids = job.ranks()
    time.sleep(3)
    os.kill(pids[rank], signal.SIGSTOP)
    _, said = process.communicate(timeout=60)
    lines = [line for line in said.splitlines() if "no sign of life" in line]
    assert process.returncode == 75 and len(lines) == 1, said[-2000:]
    assert f"rank {rank} (pid {pids[rank]} on {job.hosts[rank // 2].address}): no sign of life for 6 s" in lines[0]
    job.nothing_is_left()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(job, sent):
    process = job.start("sequence_parallel_size=4", "epochs=100000")
    job.wait_for_a_step(process)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + sent and said.splitlines()[-1] == f"stopped by {sent.name}"
    job.nothing_is_left()


def test_what_is_wrong_on_all_is_said_once(job):
    (job.folder / "chats.jsonl").write_text('{"messages": 3}\n')
    _, said = job.run(code=2)
    assert len([line for line in said.splitlines() if "chats.jsonl" in line]) == 1, said


def test_hosts_that_cannot_be_reached_are_said_in_a_sentence(job, tmp_path):
    down = job.hosts[0].address.rsplit(".", 1)[0] + ".99"
    (job.folder / "down").write_text(f"{job.hosts[0].address} slots=2\n{down} slots=2\n")
    _, said = job.run(code=75, hostfile="down")
    assert said.splitlines()[-1].startswith(f"{down}: ssh: ") and job.left() == []
    other = tmp_path / "other-ssh"
    other.mkdir()
    (other / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F /dev/null -o UserKnownHostsFile={job.ssh}/known_hosts "$@"\n')
    (other / "ssh").chmod(0o755)
    _, said = job.run(code=2, path=f"{other}:{os.environ['PATH']}")
    assert "expected to log in without a password: `ssh -p 2222 " in said and "Permission denied" in said


def test_a_machine_with_another_build_or_none_is_named(job):
    """Of two namespaces both see these files: one machine's login is made to see others."""
    shell = job.ssh / "bin" / "ssh"
    before = shell.read_text()
    try:
        shell.write_text(before.replace('"$@"', f'$(echo "$@" | sed "/{job.hosts[1].address}/s#{BUILD}#/nowhere#")'))
        _, said = job.run(code=2)
        assert said.splitlines()[-1] == f"{job.hosts[1].address}: no {ULYSSES} there: use a path that all machines share, or install it there"
    finally:
        shell.write_text(before)


def test_each_machine_started_by_hand(job):
    """--no_ssh: the same command on each, with its place."""
    common = ["ip", "netns", "exec"]
    started = [
        subprocess.Popen([*common, host.name, str(ULYSSES), "run.yml", "--device", "cpu", "-H", "hostfile", "--no_ssh", "--node_rank", str(i), "--master_addr", job.hosts[0].address, "sequence_parallel_size=4"],
                         cwd=job.folder, env=fixtures.environment(), stderr=subprocess.PIPE, text=True)
        for i, host in enumerate(job.hosts)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert len(job.metrics()) > 0


@pytest.fixture
def own_copy(job, tmp_path_factory):
    """What the second machine sees as the job's folder: a copy of its own."""
    copy = tmp_path_factory.mktemp("copy") / "job"
    (job.folder / "cache").unlink()
    (job.folder / "cache").mkdir()
    shutil.copytree(job.folder, copy)
    with job.hosts[1].own(job.folder, copy):
        yield copy


def test_machines_with_copies_of_their_own_train_the_same_or_nothing(job, own_copy):
    """Other data of the same lengths, other order, other weights: each is named."""
    job.run("sequence_parallel_size=4", "checkpoint=[]")
    a, b = (host.address for host in job.hosts)
    said_of_data = f"rank 2 on {b}: its data to train on are not those of rank 0 on {a}: expected the same files of data, tokenizer and chat template on all machines"
    chats = (own_copy / "chats.jsonl").read_text()
    for other in (chats.replace("word", "rows"), "".join(reversed(chats.splitlines(True)))):
        (own_copy / "chats.jsonl").write_text(other)
        assert said_of_data in job.run("checkpoint=[]", code=2)[1]
    (own_copy / "chats.jsonl").write_text(chats + "\n")    # other bytes, the same tokens
    job.run("checkpoint=[]", "exit_iteration=1")
    weights = own_copy / "model" / "model.safetensors"
    fixtures.write_weights(weights, {name: w * 3 if "layers.1.mlp.up_proj" in name else w for name, w in fixtures.weights().items()})
    assert f"rank 2 on {b}: the weights in model there are not those of rank 0 on {a}: expected the same model on all machines" in job.run("checkpoint=[]", code=2)[1]


def test_states_that_not_all_machines_see_are_said(job, tmp_path_factory):
    """Another folder in the place of all states, of one, without the newest: nothing is renamed, no older one is used."""
    states = job.folder / "states"
    saves = ("checkpoint=[{output_dir: states, save_every_n_steps: 1, auto_resume: true}]", "exit_iteration_this_run=2")
    job.run(*saves)
    before = sorted(states.rglob("*"))
    for place, missing in ((states, "states/run.lock"), (states / "global_step_2", "states/global_step_2/manifest.json")):
        with job.hosts[1].own(place, tmp_path_factory.mktemp("own")):
            _, said = job.run(*saves, code=2)
        assert "output_dir has to be on a file system that all machines share: " in said and f"{job.hosts[1].address} does not see {missing}" in said and "DAMAGED" not in said, said
    with job.hosts[0].own(states / "global_step_2", tmp_path_factory.mktemp("own")):
        _, said = job.run(*saves, code=2)
    assert f"{job.hosts[0].address} does not see states/global_step_2" in said, said
    assert sorted(states.rglob("*")) == before
    assert "going on from states/global_step_2" in job.run(*saves)[1]


def test_other_data_to_evaluate_on_are_named(job, own_copy):
    for folder in (job.folder, own_copy):
        (folder / "eval.jsonl").write_text((folder / "chats.jsonl").read_text())
    (own_copy / "eval.jsonl").write_text((own_copy / "eval.jsonl").read_text().replace("word", "rows"))
    assert "its data to evaluate on are not those of rank 0" in job.run("checkpoint=[]", "data.eval_sources=[eval.jsonl]", "eval_interval=1", code=2)[1]


def test_a_file_for_each_rank(job):
    (job.folder / "logs").mkdir()
    job.run("sequence_parallel_size=4", "--enable_each_rank_log", "logs")
    assert sorted(path.name for path in (job.folder / "logs").iterdir()) == [f"rank_{r}.log" for r in range(4)]
    assert "Train iter" in (job.folder / "logs" / "rank_0.log").read_text()
