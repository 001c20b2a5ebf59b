"""The command line and the local launcher, through the real program.

The engine is played by a script (ULYSSES_ENGINE) whose ranks end, die or hang as each test says, and the Python side by
one that answers with a token file made here (ULYSSES_PYTHON); so these tests need no LibTorch and take seconds.
"""

import json
import os
import pathlib
import signal
import stat
import struct
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

import fixtures  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
RECIPE = """\
model: {name_or_path: MODEL, init: random}
data: {sources: [chats.jsonl], max_length: 256}
sequence_parallel_size: 2
"""

# Each rank does what ACTIONS (a JSON object, rank -> list of actions) tells it.
ENGINE = """\
#!PYTHON
import json, os, signal, sys, time
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])  # which the launcher holds until the engine says what they mean
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in the background, whose shell has it ignored
rank = os.environ["RANK"]
open(os.path.join(os.environ["NOTES"], "rank" + rank), "w").write(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}))
for action, value in json.loads(os.environ.get("ACTIONS", "{}")).get(rank, []):
    if action == "say": print(value, file=sys.stderr, flush=True)
    if action == "print": print(value, flush=True)
    if action == "sleep": time.sleep(value)
    if action == "ignore": signal.signal(value, signal.SIG_IGN)
    if action == "exit on": signal.signal(value[0], lambda *_, code=value[1]: os._exit(code))
    if action == "die": os.kill(os.getpid(), value); time.sleep(60)
    if action == "exit": os._exit(value)
"""


def write_token_file(path):
    ids, starts = [1, 2, 3, 4, 5, 6, 7, 8], [0, 5, 8]
    parts = {"ids": ("I32", struct.pack("<8i", *ids)), "trained": ("U8", bytes([0, 0, 1, 1, 1, 0, 1, 1])), "starts": ("I64", struct.pack("<3q", *starts))}
    header, at = {"__metadata__": {"format": "ulysses-tokens-1", "vocabulary": "9", "provenance": "{}"}}, 0
    for name, (dtype, data) in parts.items():
        count = {"ids": 8, "trained": 8, "starts": 3}[name]
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, data in parts.values()))


def write_script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Job:
    """A folder with a recipe, a model's configuration, and scripts in place of engine and Python."""

    def __init__(self, folder):
        self.folder, self.notes = folder, folder / "notes"
        (folder / "model").mkdir()
        self.notes.mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
        (folder / "run.yml").write_text(RECIPE.replace("MODEL", str(folder / "model")))
        write_token_file(folder / "tokens.safetensors")
        answer = {"tokens": str(folder / "tokens.safetensors"), "num_samples": 2, "longest": 5, "num_tokens": 8, "num_trained_tokens": 5, "cached": True}
        write_script(folder / "python", f"#!/bin/sh\ncp \"$4\" {self.notes}/request.json\necho '{json.dumps(answer)}'\n")
        write_script(folder / "engine", ENGINE.replace("PYTHON", sys.executable))
        self.program = ULYSSES
        self.environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "CUDA_DEVICE_ORDER", "ULYSSES_SHARE_GPU", "OMP_NUM_THREADS")}
        self.environment |= {"CUDA_VISIBLE_DEVICES": "", "ULYSSES_PYTHON": str(folder / "python"), "ULYSSES_ENGINE": str(folder / "engine"), "NOTES": str(self.notes)}

    def start(self, *arguments, actions=None, **environment):
        environment = self.environment | {"ACTIONS": json.dumps({str(k): v for k, v in (actions or {}).items()})} | environment
        environment = {k: v for k, v in environment.items() if v is not None}
        return subprocess.Popen([str(self.program), *arguments], cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *arguments, actions=None, **environment):
        process = self.start(*arguments, actions=actions, **environment)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def note(self, rank):
        path = self.notes / f"rank{rank}"
        for _ in range(400):
            if path.exists() and path.read_text():
                return json.loads(path.read_text())
            time.sleep(0.05)
        raise AssertionError(f"rank {rank} was not started")


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_ends(pids, seconds=5):
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, "a rank outlived the launcher"
        time.sleep(0.05)


# --- the command line


def test_needs_no_torch():
    libraries = subprocess.run(["ldd", str(ULYSSES)], capture_output=True, text=True, check=True).stdout
    assert not [line for line in libraries.splitlines() if any(name in line for name in ("libtorch", "libc10", "libcud"))]  # an address may spell c10


def test_a_plan_takes_less_than_a_fifth_of_a_second(job):
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        assert job.run("plan", "run.yml", ULYSSES_PYTHON="/nowhere", ULYSSES_ENGINE="/nowhere").returncode == 0
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.2


def test_a_plan_as_json_is_an_object_with_its_hash(job):
    done = job.run("plan", "run.yml", "--json", "--num_gpus", "4")
    assert done.returncode == 0, done.err
    assert json.loads(done.out)["hash"]


def test_help_and_version_go_to_stdout(job):
    for arguments in (["--help"], ["train", "--help"]):
        done = job.run(*arguments)
        assert done.returncode == 0 and "ulysses plan run.yml" in done.out and done.err == ""
    assert job.run("--version").out.startswith("ulysses ")


def test_no_arguments_print_the_help_and_fail(job):
    done = job.run()
    assert done.returncode == 2 and "RECIPE.yml" in done.err


def test_docs_print_the_reference(job):
    done = job.run("docs")
    assert done.returncode == 0 and "sequence_parallel_size" in done.out


def test_doctor_says_what_is_missing(job):
    done = job.run("doctor", "--json", ULYSSES_ENGINE="/nowhere/engine")
    assert done.returncode == 2
    answer = json.loads(done.out)
    assert answer["engine"] == {"path": "/nowhere/engine", "answer": ""}
    assert answer["cores"] >= 1 and answer["memory_bytes"] > 0


@pytest.mark.parametrize("environment, folder", [
    ({"HF_HUB_CACHE": "/a/hub"}, "/a/hub"),
    ({"HF_HUB_CACHE": "$HF_HOME/x", "HF_HOME": "/h"}, "/h/x"),
    ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/h"}, "/b"),
    ({"HF_HOME": "/h"}, "/h/hub"),
    ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ({"HOME": "/home/me"}, "/home/me/.cache/huggingface/hub"),
    ({"HF_HOME": "~/hf", "HOME": "/home/me"}, "/home/me/hf/hub"),
])
def test_the_hub_cache_is_where_huggingface_hub_has_it(job, environment, folder):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        job.environment.pop(name, None)
    assert json.loads(job.run("doctor", "--json", **environment).out)["hub"]["cache"] == folder


@pytest.mark.parametrize("arguments, said", [
    (["selftest"], "ulysses selftest: not available yet"),
    (["report"], "ulysses report: not available yet"),
    (["train"], "expected a recipe, found none"),
    (["plan", "missing.yml"], "missing.yml: cannot read the recipe"),
    (["train", "run.yml", "--nonsense"], "--nonsense"),
    (["train", "run.yml", "epochs"], "expected key.path=value after the recipe, found 'epochs'"),
    (["train", "run.yml", "-H", "hosts"], "--hostfile: hosts cannot be read: No such file or directory"),
    (["train", "run.yml", "--num_nodes", "2"], "--num_nodes: expected a --hostfile that names the machines"),
    (["train", "run.yml", "--device", "tpu"], "--device: expected cpu or cuda, found 'tpu'"),
    (["train", "run.yml", "--num_gpus", "3"], "sequence_parallel_size (run.yml:3): expected a divisor of 3 ranks, found 2"),
    (["train", "run.yml", "--max_restarts", "-1"], "--max_restarts: expected a whole number from 0 on, found '-1'"),
    (["train", "run.yml", "--num_gpus", "0"], "--num_gpus: expected a whole number of at least 1, found '0'"),
])
def test_refuses_with_one_sentence_and_2(job, arguments, said):
    done = job.run(*arguments)
    assert done.returncode == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.skipif(bool(list(pathlib.Path("/dev").glob("nvidia[0-9]*"))), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(job):
    done = job.run("train", "run.yml", "--device", "cuda", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 2 and done.err == "--device cuda: no GPU is visible: this machine has none\n"


def test_a_profile_that_cannot_be_written_is_refused(job):
    done = job.run("run.yml", "--device", "cpu", "--profile", "nowhere/trace.json")
    assert (done.returncode, done.err) == (2, "--profile: nowhere/trace.json cannot be written: No such file or directory\n")
    done = job.run("run.yml", "--device", "cpu", "--profile", "model")
    assert (done.returncode, done.err) == (2, "--profile: expected a file, found the folder model\n")


def test_what_comes_later_is_planned_but_not_trained(job):
    assert job.run("plan", "run.yml", "mem_profiler=step").returncode == 0
    done = job.run("train", "run.yml", "mem_profiler=step")
    assert done.returncode == 2 and "mem_profiler" in done.err and done.err.endswith("not available yet\n")


def test_the_exit_code_of_the_python_side_is_passed_on(job):
    write_script(job.folder / "python", "#!/bin/sh\necho 'the network is down' >&2\nexit 75\n")
    done = job.run("prepare", "run.yml")
    assert (done.returncode, done.err) == (75, "the network is down\n")


def test_a_python_that_cannot_be_used_is_named(job):
    write_script(job.folder / "python", "#!/bin/sh\necho 'No module named ulysses_plus' >&2\nexit 1\n")
    python = job.folder / "python"
    done = job.run("prepare", "run.yml")
    assert (done.returncode, done.err) == (2, f"No module named ulysses_plus\nenvironment variable ULYSSES_PYTHON: {python} cannot run ulysses_plus.prepare, see above: expected a Python with ulysses_plus and what it needs\n")
    python.chmod(0o644)
    done = job.run("prepare", "run.yml")
    assert (done.returncode, done.err) == (2, f"{python}: expected the Python environment here: Permission denied; `make setup` makes it, ULYSSES_PYTHON names another\n")


def test_prepare_prints_the_facts(job):
    assert json.loads(job.run("prepare", "run.yml", "--json").out)["num_samples"] == 2
    assert job.run("process-data", "run.yml").out.startswith("2 samples, 8 tokens, 5 of them trained; the longest has 5\n")
    request = json.loads((job.notes / "request.json").read_text())
    assert request["vocab_size"] == 256 and request["type"] == "sft" and request["where"]["data.sources"] == "run.yml:2"


# --- the launcher


def test_every_rank_gets_its_place_and_the_same_command(job):
    done = job.run("run.yml", "--num_gpus", "4", "--master_port", "29876", "epochs=2", "--device", "cpu")
    assert done.returncode == 0, done.err
    for rank in range(4):
        note = job.note(rank)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}
        assert {name: note["env"][name] for name in place} == place
        assert int(note["env"]["OMP_NUM_THREADS"]) == max(1, os.cpu_count() // 4)
        assert note["argv"][:2] == ["train", "run.yml"] and note["argv"][-1] == "epochs=2"
        assert note["argv"][note["argv"].index("--tokens") + 1] == str(job.folder / "tokens.safetensors")


def test_a_profile_is_left_to_the_engine(job):
    assert job.run("run.yml", "--device", "cpu", "--profile", "trace.json", "epochs=2").returncode == 0
    for rank in range(2):
        argv = job.note(rank)["argv"]
        assert argv[argv.index("--profile") + 1] == "trace.json" and argv[-1] == "epochs=2"
    job.run("run.yml", "--device", "cpu")
    assert "--profile" not in job.note(0)["argv"]


def on_gpus(job, count, **more):
    """A machine with so many GPUs and a program that can use them."""
    job.program = fixtures.program_with_gpu_part(ULYSSES, job.folder)
    return fixtures.fake_gpus(*[fixtures.gpu()] * count, **more)


@pytest.mark.parametrize("arguments", [["--device", "cuda"], []])
def test_ranks_are_told_to_use_the_gpus_as_they_were_counted(job, arguments):
    done = job.run("run.yml", *arguments, **on_gpus(job, 2))
    assert done.returncode == 0, done.err
    assert done.err == ("" if arguments else "device: cuda (2 x NVIDIA H200, 139.8 GiB each)\n")
    for rank in range(2):
        note = job.note(rank)
        assert note["argv"][note["argv"].index("--device") + 1] == "cuda"
        assert (note["env"]["LOCAL_RANK"], note["env"]["CUDA_DEVICE_ORDER"]) == (str(rank), "PCI_BUS_ID")


def test_ranks_share_gpus_only_when_that_is_asked_for(job):
    environment = on_gpus(job, 1)
    done = job.run("run.yml", "--device", "cuda", **environment)
    assert (done.returncode, done.err) == (2, "2 ranks need as many GPUs on this machine; this machine shows 1\n")
    assert job.run("run.yml", "--device", "cuda", **environment, ULYSSES_SHARE_GPU="1").returncode == 0
    assert job.note(1)["env"]["ULYSSES_SHARE_GPU"] == "1"


def test_a_rank_of_another_launchers_job_uses_gpus_too(job):
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29877"}
    done = job.run("run.yml", "--device", "cuda", **place, **on_gpus(job, 2))
    assert done.returncode == 0, done.err
    assert "cuda" in job.note(1)["argv"] and job.note(1)["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_the_device_is_said_aloud_when_it_was_not_asked_for(job):
    assert "device: cpu (" in job.run("run.yml").err
    assert "device:" not in job.run("run.yml", "--device", "cpu").err


def test_rank_0_is_forwarded_as_it_is_and_others_with_their_name(job):
    done = job.run("run.yml", actions={0: [["print", "step 1"], ["say", "hello"]], 1: [["say", "there"]]})
    assert done.returncode == 0
    assert done.out == "step 1\n"
    assert "hello" in done.err.splitlines() and "[rank 1] there" in done.err.splitlines()


def test_the_first_failure_decides_and_is_told_once(job):
    done = job.run("run.yml", actions={
        0: [["sleep", 0.1], ["say", "rank 0: all_reduce failed at rank 1"], ["exit", 75]],
        1: [["say", "error: tokens.safetensors: truncated"], ["exit", 2]],
    })
    assert done.returncode == 2
    assert done.err.count("[rank 1] error: tokens.safetensors: truncated") == 1
    assert done.err.endswith("rank 1 ended with exit code 2; the other ranks were stopped\n")


def test_the_same_failure_on_all_ranks_is_told_once(job):
    done = job.run("run.yml", actions={0: [["say", "bad recipe"], ["exit", 2]], 1: [["say", "error: bad recipe"], ["exit", 2]]})
    assert done.returncode == 2 and done.err.count("bad recipe") == 1


def test_also_where_rank_0_comes_to_it_much_later(job):
    done = job.run("run.yml", actions={0: [["ignore", signal.SIGTERM], ["sleep", 1.0], ["say", "bad recipe"], ["exit", 2]], 1: [["say", "error: bad recipe"], ["exit", 2]]})
    assert done.returncode == 2 and done.err.count("bad recipe") == 1 and done.err.splitlines()[-1] == "bad recipe"


def test_a_killed_rank_is_named_and_the_others_stop(job):
    began = time.monotonic()
    done = job.run("run.yml", actions={0: [["sleep", 60]], 1: [["sleep", 0.2], ["die", signal.SIGKILL]]})
    assert done.returncode == 75
    assert done.err.splitlines()[-1] == f"rank 1 (pid {job.note(1)['pid']}) was killed by signal 9 (SIGKILL); the other ranks were stopped"
    assert time.monotonic() - began < 10
    assert not is_alive(job.note(0)["pid"])


def test_a_rank_that_ignores_sigterm_is_killed_after_5_seconds(job):
    began = time.monotonic()
    done = job.run("run.yml", actions={0: [["ignore", signal.SIGTERM], ["sleep", 60]], 1: [["sleep", 0.5], ["exit", 76]]})
    assert done.returncode == 76
    assert 5 < time.monotonic() - began < 15
    assert not is_alive(job.note(0)["pid"])


def wait_until(done, seconds=20):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def started(job, actions):
    process = job.start("run.yml", actions=actions)
    pids = [job.note(rank)["pid"] for rank in range(2)]
    time.sleep(0.5)    # until the handlers are set
    return process, pids


def test_sigterm_reaches_the_ranks_which_may_save(job):
    process, pids = started(job, {r: [["exit on", [signal.SIGTERM, 85]], ["sleep", 60]] for r in range(2)})
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 85
    assert_ends(pids)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_no_request_is_left_behind(job, sent):
    """It may hold a token: it is in no file, not even while data are prepared."""
    (job.folder / "tmp").mkdir()
    write_script(job.folder / "python", f"#!/bin/sh\ncp \"$4\" {job.notes}/request.json\nexec sleep 60\n")
    process = job.start("run.yml", "data.sources=[{name_or_path: chats.jsonl, kwargs: {token: in-clear}}]", TMPDIR=str(job.folder / "tmp"))
    request = job.notes / "request.json"
    wait_until(lambda: request.exists() and "in-clear" in request.read_text())
    assert list((job.folder / "tmp").iterdir()) == []
    process.send_signal(sent)
    process.wait(20)
    assert list((job.folder / "tmp").iterdir()) == []


def test_ports_are_free_at_all_addresses_of_the_machine(tmp_path):
    """Of ten, nine are taken at an address that is not the loopback's."""
    script = (
        "import socket, subprocess, sys\n"
        "taken = [socket.create_server(('10.77.0.1', port)) for port in range(41000, 41009)]\n"
        "out = subprocess.Popen([sys.argv[1], 'follow'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(out.stdout.readline().decode())\n"
        "out.kill()\n"
    )
    setup = "ip link set lo up && ip address add 10.77.0.1/32 dev lo && echo 41000 41009 > /proc/sys/net/ipv4/ip_local_port_range && exec \"$@\""
    done = subprocess.run(["unshare", "--net", "sh", "-c", setup, "sh", sys.executable, "-c", script, str(ULYSSES)], cwd=tmp_path, env=fixtures.environment(), capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"no machine of its own can be played here: {done.stderr.strip()}")
    assert json.loads(done.stdout[1:])["facts"]["port"] == 41009


def test_ctrl_c_ends_ranks_that_do_nothing_about_it(job):
    process, pids = started(job, {r: [["exit on", [signal.SIGUSR1, 0]], ["sleep", 60]] for r in range(2)})
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert process.returncode != 0
    assert_ends(pids)


def test_a_second_signal_ends_everything_at_once(job):
    process, pids = started(job, {r: [["ignore", signal.SIGINT], ["ignore", signal.SIGTERM], ["sleep", 60]] for r in range(2)})
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)    # as of one wish
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(3) == 128 + signal.SIGINT
    assert_ends(pids)


def test_ranks_die_with_the_launcher(job):
    process, pids = started(job, {r: [["ignore", signal.SIGTERM], ["sleep", 60]] for r in range(2)})
    process.kill()
    process.wait(5)
    assert_ends(pids)


def test_joins_a_job_that_another_launcher_started(job):
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29877"}
    process = job.start("run.yml", actions={1: [["exit", 76]]}, **place)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 76
    assert job.note(1)["pid"] == process.pid and not (job.notes / "rank0").exists()
    assert err == ""    # rank 0 speaks for the job


@pytest.mark.parametrize("change, said", [
    ({"RANK": "two"}, "environment variable RANK: expected a whole number from 0 to 1, found 'two'"),
    ({"RANK": "2"}, "environment variable RANK: expected a whole number from 0 to 1, found '2'"),
    ({"MASTER_PORT": ""}, "environment variable MASTER_PORT: expected a number"),
])
def test_a_broken_environment_is_named(job, change, said):
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29877"}
    done = job.run("run.yml", **(place | change))
    assert done.returncode == 2 and said in done.err


def test_a_missing_engine_is_named(job):
    done = job.run("run.yml", ULYSSES_ENGINE="/nowhere/engine")
    assert done.returncode == 2 and done.err.startswith("/nowhere/engine: expected the engine here")


@pytest.mark.parametrize("address, said", [
    ("192.0.2.7", "rank 0 cannot listen at 192.0.2.7: it is not an address of this machine: expected one of its own that all can reach"),
    ("nonsense.invalid", "the ranks are to meet at nonsense.invalid, a name that has no address here: "),
])
@pytest.mark.parametrize("by", ["--master_addr", "environment variable MASTER_ADDR"])
def test_an_address_at_which_ranks_cannot_meet_is_said_at_once(job, by, address, said):
    """Before anything is prepared."""
    (job.folder / "hosts").write_text("here slots=1\nthere slots=1\n")
    if by == "--master_addr":
        done = job.run("run.yml", "--device", "cpu", "-H", "hosts", "--no_ssh", "--node_rank", "0", "--master_addr", address)
    else:
        done = job.run("run.yml", "--device", "cpu", RANK="0", WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT="29879")
    assert done.returncode == 2 and done.err.startswith(f"{by}: {said}") and len(done.err.splitlines()) == 1, done.err
    assert not (job.notes / "request.json").exists() and not (job.notes / "rank0").exists()
