"""The same job as ranks that torchrun, mpirun and srun start."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

import fixtures
from test_hosts import ULYSSES


def losses(folder):
    import json

    return [(m["loss"], m["grad_norm"]) for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def run(folder, *command, timeout=120, **environment):
    done = subprocess.run([str(part) for part in command], cwd=folder, env=fixtures.environment(**environment), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def folder(tmp_path):
    """With what two ranks of `ulysses` itself find."""
    fixtures.tiny(tmp_path)
    run(tmp_path, ULYSSES, "run.yml", "--device", "cpu")
    (tmp_path / "expected").mkdir()
    (tmp_path / "metrics.jsonl").rename(tmp_path / "expected" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "out")
    return tmp_path


def test_torchrun(folder):
    run(folder, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--no_python", "--master_port", 29731, ULYSSES, "run.yml", "--device", "cpu")
    assert losses(folder) == losses(folder / "expected")


@pytest.mark.parametrize("other, words", [("epochs=3", "rank 1: its recipe is not rank 0's: epochs: 1 -> 3 there: all ranks need the same"), (None, "rank 1: another build of ulysses (")])
def test_ranks_that_differ_are_named_before_anything_is_loaded(folder, tmp_path, other, words):
    """As ranks that somebody starts by hand: one with another recipe, or another build."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29733"}
    more = {}
    if other is None:
        engine = tmp_path / "engine"
        engine.write_bytes((ULYSSES.parent / "ulysses-engine").read_bytes() + b"x")
        engine.chmod(0o755)
        more = {"ULYSSES_ENGINE": str(engine)}
    ranks = [subprocess.Popen([str(ULYSSES), "run.yml", "--device", "cpu", *([other] if rank and other else [])], cwd=folder, env=fixtures.environment(RANK=str(rank), LOCAL_RANK=str(rank), **place, **(more if rank else {})),
                              stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2] and words in said[0], said


def test_mpirun(folder):
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun here: Debian's package openmpi-bin")
    run(folder, "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 2, ULYSSES, "run.yml", "--device", "cpu")
    assert losses(folder) == losses(folder / "expected")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A controller and two nodes, all on this machine; returns what to add to the environment."""
    for program, package in (("slurmctld", "slurmctld"), ("slurmd", "slurmd"), ("srun", "slurm-client")):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here: Debian's package {package}")
    if os.geteuid() != 0:
        pytest.skip("slurmd has to be root")
    folder, host = tmp_path_factory.mktemp("slurm"), os.uname().nodename.split(".")[0]
    folder.chmod(0o755)
    port = 23000 + os.getpid() % 2000 * 4
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 2} CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
""")
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"]}
    started = [subprocess.Popen(["slurmctld", "-D"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    started += [subprocess.Popen(["slurmd", "-D", "-N", name], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in ("n1", "n2")]
    try:
        for _ in range(150):
            if subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environment, capture_output=True, text=True).stdout.strip() == "2":
                break
            if any(process.poll() is not None for process in started):
                break
            time.sleep(0.2)
        idle = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environment, capture_output=True, text=True).stdout.strip()
        if idle != "2":
            logs = {path.name: path.read_text()[-400:] for path in folder.glob("*.log")}
            pytest.skip(f"slurm does not come up here: {logs}")
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_srun_on_two_nodes(slurm, folder):
    """The nodes are this machine by other names, so that the first one's name means nothing to anybody: MASTER_ADDR says it."""
    run(folder, "srun", "-N", 2, "-n", 2, "--ntasks-per-node", 1, ULYSSES, "run.yml", "--device", "cpu", MASTER_ADDR="127.0.0.1", **slurm)
    assert losses(folder) == losses(folder / "expected")


def test_srun_where_the_first_nodes_name_means_nothing(slurm, folder):
    done = subprocess.run(["srun", "-N", "2", "-n", "2", "--ntasks-per-node", "1", str(ULYSSES), "run.yml", "--device", "cpu"], cwd=folder, env=fixtures.environment(**slurm), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "the ranks are to meet at n1, a name that has no address here: " in done.stderr, done.stderr


def test_srun_on_one_node(slurm, folder):
    run(folder, "srun", "-N", 1, "-n", 2, ULYSSES, "run.yml", "--device", "cpu", **slurm)
    assert losses(folder) == losses(folder / "expected")


def test_a_batch_script_is_no_rank(slurm, folder):
    """In it, beside srun, SLURM_PROCID is set as well: ulysses starts its ranks itself."""
    script = folder / "job.sh"
    script.write_text(f"#!/bin/sh\nexec {ULYSSES} run.yml --device cpu\n")
    run(folder, "sbatch", "--wait", "-n", 2, "-o", folder / "log", script, **slurm)
    assert losses(folder) == losses(folder / "expected"), pathlib.Path(folder / "log").read_text()
