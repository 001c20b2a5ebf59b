"""A job on other machines, where ssh is played by a script that runs the command here, and the engine as in test_cli.py."""

import os
import pathlib
import signal
import time

import pytest
import test_cli

RECIPE = test_cli.RECIPE + "checkpoint: [{type: deepspeed, output_dir: states, save_every_n_steps: 2, auto_resume: true}]\n"
SSH = """\
#!/bin/sh
for last; do :; done
touch {folder}/called
sleep ${{SSH_SLEEPS:-0}}
exec /bin/sh -c "$last"
"""


@pytest.fixture
def job(tmp_path):
    job = test_cli.Job(tmp_path)
    (tmp_path / "run.yml").write_text(RECIPE.replace("MODEL", str(tmp_path / "model")))
    (tmp_path / "hosts").write_text("away slots=1\nfurther slots=1\n")
    (tmp_path / "bin").mkdir()
    test_cli.write_script(tmp_path / "bin" / "ssh", SSH.format(folder=tmp_path))
    job.environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
    return job


OVER_SSH = ("run.yml", "--device", "cpu", "-H", "hosts", "--master_addr", "127.0.0.1")


def wait_for(done):
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < 20
        time.sleep(0.02)


def test_asked_to_stop_before_all_machines_have_answered_it_ends_with_85(job):
    process = job.start(*OVER_SSH, SSH_SLEEPS="30")
    wait_for((job.folder / "called").exists)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 85 and said.splitlines()[-1] == "stopped before the first step; start again"
    process = job.start(*OVER_SSH, "checkpoint=[]", SSH_SLEEPS="30")    # nothing would be saved
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM and said.splitlines()[-1] == "stopped by SIGTERM"


def test_the_kill_switch_ends_a_preparation_on_all_machines(job):
    test_cli.write_script(job.folder / "python", "#!/bin/sh\ntouch prepares\nexec sleep 60\n")
    for more, code in (((), 85), (("checkpoint=[]",), 0)):    # nothing would be saved: as its run ends
        process = job.start(*OVER_SSH, "kill_switch_path=stop", *more)
        wait_for((job.folder / "prepares").exists)
        (job.folder / "stop").touch()
        _, said = process.communicate(timeout=10)
        assert process.returncode == code and "stop exists: stopping before the first step" in said.splitlines(), said
        (job.folder / "stop").unlink()
        (job.folder / "prepares").unlink()


def test_one_machine_asked_to_stop_while_data_are_prepared_ends_all(job):
    test_cli.write_script(job.folder / "python", "#!/bin/sh\ntouch prepares.$$\nexec sleep 60\n")
    process = job.start(*OVER_SSH)
    wait_for(lambda: len(list(job.folder.glob("prepares.*"))) == 2)
    follower = next(place for place in test_cli.fixtures.processes_in(job.folder, "ulysses") if (place / "cmdline").read_bytes().endswith(b"\0follow\0"))
    os.kill(int(follower.name), signal.SIGTERM)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 85 and said.splitlines()[-1] == "stopped before the first step; start again", said


def test_asked_to_stop_between_restarts_it_ends_with_85(job):
    process = job.start(*OVER_SSH, "--max_restarts", "5", actions={1: [["exit", 75]], 0: [["sleep", 30]]})
    said = ""
    while "restart 1 of 5" not in said:
        said = process.stderr.readline()
        assert said, "it ended"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 85 and said == "stopped before the first step; start again\n"


def test_a_file_of_variables_that_is_not_there_is_named(job):
    done = job.run(*OVER_SSH, DS_ENV_FILE="nofile")
    assert (done.returncode, done.err) == (2, f"environment variable DS_ENV_FILE: expected a file of lines KEY=VALUE, found none at {job.folder}/nofile nor at {job.folder}/nofile\n")
    (job.folder / "hosts").write_bytes(b"\xef\xbb\xbfaway slots=1\nfurther slots=1\n")    # as some editors begin a file
    assert job.run(*OVER_SSH).returncode == 0


def test_many_variables_arrive(job):
    """More than a pipe holds."""
    (job.folder / ".deepspeed_env").write_text("".join(f"MANY_{i}={'x' * 1000}{i}\n" for i in range(300)))
    process = job.run(*OVER_SSH)
    assert process.returncode == 0, process.err
    for rank in range(2):
        environment = job.note(rank)["env"]
        assert all(environment[f"MANY_{i}"] == "x" * 1000 + str(i) for i in range(300))


def test_what_is_not_utf8_is_refused_by_its_name(job):
    (job.folder / ".deepspeed_env").write_bytes(b"A=fine\nOF_MINE=secret\xff\n")
    process = job.run(*OVER_SSH)
    assert process.returncode == 2 and process.err.splitlines()[-1] == f"{job.folder}/.deepspeed_env:2: OF_MINE: expected a value in UTF-8"
    (job.folder / ".deepspeed_env").write_bytes("A=größer\n".encode())
    process = job.run(*OVER_SSH, WANDB_NAME=b"secret\xff")
    assert process.returncode == 2 and process.err.splitlines()[-1] == "environment variable WANDB_NAME: expected a value in UTF-8, as ranks on other machines get it"
    job.folder = pathlib.Path(os.fsdecode(os.fsencode(job.folder) + b"/f\xff"))
    job.folder.mkdir()
    process = job.run("../run.yml", *OVER_SSH[1:4], "../hosts")
    assert process.returncode == 2 and process.err.splitlines()[-1].endswith("f\\ufffd\": expected a folder whose path is UTF-8, as other machines are told it")


def test_ranks_of_one_job_have_a_word_of_their_own(job):
    """On one machine and over ssh; the ranks of each the same."""
    words = set()
    for arguments in (OVER_SSH, ("run.yml", "--device", "cpu"), ("run.yml", "--device", "cpu")):
        for note in job.notes.glob("rank*"):
            note.unlink()
        assert job.run(*arguments, ULYSSES_JOB_TOKEN="of somebody else").returncode == 0
        first, second = (job.note(rank)["env"] for rank in range(2))
        assert first["ULYSSES_JOB_TOKEN"] == second["ULYSSES_JOB_TOKEN"] and len(first["ULYSSES_JOB_TOKEN"]) == 33
        assert first["ULYSSES_STARTED"] == "together" and not any(first["ULYSSES_JOB_TOKEN"] in word for word in job.note(0)["argv"])
        words.add(first["ULYSSES_JOB_TOKEN"])
    assert len(words) == 3


@pytest.mark.parametrize("where", [(), OVER_SSH[3:]])
def test_a_restart_goes_on_with_the_log_of_each_rank(job, where):
    """What the run said that failed is what one wants to read."""
    (job.folder / "logs").mkdir()
    (job.folder / "logs" / "rank_1.log").write_text("of another job\n")
    process = job.run("run.yml", "--device", "cpu", *where, "--max_restarts", "1", "--enable_each_rank_log", "logs", actions={1: [["say", "so it ends"], ["exit", 75]]})
    assert process.returncode == 75 and (job.folder / "logs" / "rank_1.log").read_text() == "so it ends\n" * 2
