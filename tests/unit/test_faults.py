"""What fails or is short beside the device, in the real program: one sentence, the exit code that it should have, whole checkpoints, nothing left behind."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest
import tiers
from tiers import fixtures

KIB, MIB = 1 << 10, 1 << 20
RANKS = {1: ["sequence_parallel_size=1"], 2: ["sequence_parallel_size=2"]}
WAYS = ["layers on the disk", "optimizer on the disk"]
USER, WILL_NOT_FIT, DEVICE = 2, 3, 75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tiers.make_job(folder)
    return folder


@pytest.fixture(scope="module")
def resident(folder):
    """For a number of ranks: the run with all in one place, and the longest micro-batch."""
    known = {}

    def of(ranks):
        if ranks not in known:
            steps, weights, said = tiers.train(folder, *RANKS[ranks])
            known[ranks] = steps, weights, tiers.longest_micro_batch(said)
        return known[ranks]

    return of


def arguments(folder, resident, ranks, way):
    return [*RANKS[ranks], *tiers.room_for(folder, RANKS[ranks], resident(ranks)[2], way)]


def sentences(said):
    """What was said that is neither the plan nor progress."""
    return [line for line in said.splitlines() if re.match(r"^[a-z]\S*[: ].*(fail|full|free|wanted)", line) and not re.match(r"^(memory +\d|longest|sequence|data |saved|tiers)", line)]


# ---- disks ----


FAILING, FULL = (errno.EIO, DEVICE, "ing failed: Input/output error"), (errno.ENOSPC, USER, "disk full: No space left on device")


def disk_faults():
    """Each error, way and number of ranks with each other by ULYSSES_ALL_TESTS=1; else each with some."""
    every = [(error, way, ranks) for error in (FAILING, FULL) for way in WAYS for ranks in RANKS]
    return every if os.environ.get("ULYSSES_ALL_TESTS") else [every[i] for i in (0, 3, 5, 6)]


@pytest.mark.parametrize("fault, way, ranks", disk_faults())
def test_a_disk_that_fails_at_any_moment(folder, resident, way, ranks, fault):
    """Later and later, until the run is over before."""
    error, code, words = fault
    run, weights, after, kept = arguments(folder, resident, ranks, way), resident(ranks)[1], 0, set()
    while True:
        tiers.clear(folder)
        done = subprocess.run(tiers.command(*run), cwd=folder, env=fixtures.environment(ULYSSES_DISK_FAULTS=f"after={after},error={error}"), capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            break
        assert done.returncode == code, done.stderr
        found = sentences(done.stderr)
        assert len(found) == 1 and "memory.disk: scratch: " in found[0] and words in found[0], done.stderr
        assert "internal error" not in done.stderr and "Traceback" not in done.stderr
        there = tiers.saved(folder)
        assert all(weights[name] == there[name] for name in there), there.keys()
        assert os.listdir(folder / "scratch") == []
        kept |= there.keys()
        after = after * 2 if after else 64 * KIB
    assert "global_step_1" in kept, "no fault came after the first step"
    assert tiers.saved(folder) == weights


@pytest.mark.parametrize("faults, words", [
    ("no_io_uring", "8 threads (no io_uring: Function not implemented)"),
    ("no_direct", "without O_DIRECT in scratch (its file system refuses it)"),
    ("no_fallocate,no_tmpfile", "room in scratch not reserved (its file system cannot)"),
])
def test_what_a_disk_cannot_is_said_and_changes_nothing(folder, resident, faults, words):
    steps, weights, said = tiers.train(folder, *arguments(folder, resident, 2, "optimizer on the disk"), ULYSSES_DISK_FAULTS=faults)
    assert (steps, weights) == resident(2)[:2]
    assert words in next(line for line in said.splitlines() if line.startswith("tiers"))


def test_without_locked_memory_it_works_all_the_same(folder, resident):
    tiers.clear(folder)
    tiers.run(folder, *arguments(folder, resident, 1, "layers on the disk"), before=["prlimit", "--memlock=0"])
    assert tiers.saved(folder) == resident(1)[1]


def test_a_disk_without_room_for_what_is_promised(folder, resident):
    run = arguments(folder, resident, 2, "optimizer on the disk")
    clean_up = fixtures.small_disk(folder, "small", "64k")
    try:
        tiers.clear(folder)
        more = ["memory.disk=small", "memory.disk_size=1GiB"]
        assert re.search(r"memory.disk_size \(command line\): 1.0 GiB, of which 5\d.\d KiB are free there", tiers.run(folder, *run, *more, verb="plan").stdout)
        # Whatever is promised, the plan counts on what is there.
        for promised in (more, more[:1]):
            said = tiers.run(folder, *run, *promised, code=WILL_NOT_FIT).stderr
            assert re.search(r"^disk: needs \S+ KiB for each rank, 2\d.\d KiB free: ", said, re.MULTILINE), said
            assert "Train iter" not in said and not tiers.saved(folder)
    finally:
        clean_up()
        (folder / "small").rmdir()


@contextlib.contextmanager
def thin_disk(folder):
    """A disk that has more room than there is: its writes fail once that is used up. Skips where none can be made."""
    if shutil.which("mke2fs") is None:
        pytest.skip("no mke2fs on PATH: Debian's package e2fsprogs")
    (folder / "under").mkdir()
    (folder / "thin").mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder / "thin")
        stack.callback(shutil.rmtree, folder / "under")

        def do(*command):
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"no thin disk can be made here: {done.stderr.strip()}")

        do("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder / "under")
        stack.callback(subprocess.run, ["umount", "-l", str(folder / "under")], check=True)
        image = folder / "under" / "image"
        with open(image, "wb") as file:
            file.truncate(16 * MIB)
        do("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", image)
        do("mount", "-o", "loop", image, folder / "thin")
        stack.callback(subprocess.run, ["umount", str(folder / "thin")], check=False, capture_output=True)
        with contextlib.suppress(OSError), open(folder / "under" / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        yield


def test_a_real_disk_that_is_full_in_mid_step(folder, resident):
    run = arguments(folder, resident, 1, "layers on the disk")
    with thin_disk(folder):
        tiers.clear(folder)
        done = subprocess.run(tiers.command(*run, "memory.disk=thin"), cwd=folder, env=fixtures.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode in (USER, DEVICE), done.stderr  # which of the two the kernel's loop device says
        found = sentences(done.stderr)
        assert len(found) == 1 and ("disk full" if done.returncode == USER else "failed") in found[0] and "memory.disk: thin: " in found[0]
        assert all(resident(1)[1][name] == weights for name, weights in tiers.saved(folder).items())


def wait_for(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.mark.parametrize("faults", [None, "no_tmpfile"])
def test_a_job_that_is_killed_leaves_no_scratch_file(folder, resident, faults):
    tiers.clear(folder)
    run = arguments(folder, resident, 2, "layers on the disk")
    with open(folder / "said", "w") as said:
        job = subprocess.Popen(tiers.command(*run, "min_iterations=100000"), cwd=folder, env=fixtures.environment(ULYSSES_DISK_FAULTS=faults), stderr=said)
    try:
        wait_for(lambda: "Train iter" in (folder / "said").read_text(), "no step was made")
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    wait_for(lambda: not processes_with(folder / "scratch"), "ranks outlive their launcher")
    assert os.listdir(folder / "scratch") == []


def processes_with(folder):
    """Processes that have a file of this folder open."""
    found = set()
    for link in pathlib.Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(str(folder)):
                found.add(link.parts[2])
    return found


def test_two_jobs_share_a_folder_for_scratch_files(folder, resident):
    run, jobs = arguments(folder, resident, 2, "optimizer on the disk"), []
    tiers.clear(folder)
    for i in range(2):
        mine = [f"checkpoint.output_dir=out/{i}", f"train_log_metrics_path=out/{i}.jsonl"]
        (folder / "out").mkdir(exist_ok=True)
        jobs.append(subprocess.Popen(tiers.command(*run, *mine), cwd=folder, env=fixtures.environment(), stderr=subprocess.PIPE, text=True))
    said = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    for i in range(2):
        assert [json.loads(line)["loss"] for line in (folder / "out" / f"{i}.jsonl").read_text().splitlines()] == [loss for loss, _, _ in resident(2)[0]]
        assert (folder / "out" / str(i) / "global_step_3" / "model.safetensors").read_bytes() == resident(2)[1]["global_step_3"]
    assert os.listdir(folder / "scratch") == []


# ---- memory ----


def in_fake_group(files):
    """What to put before a command for a control group of the second version with these files, seen at its top as within a container."""
    probe = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/sys/fs/cgroup"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no control group can be played here: {probe.stderr.strip()}")
    script = "mount -t tmpfs tmpfs /sys/fs/cgroup && cd /sys/fs/cgroup" + "".join(f" && printf '%s\\n' '{text}' > {name}" for name, text in files.items()) + ' && cd "$OLDPWD" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def test_a_control_groups_limit_bounds_the_plan(folder, resident):
    longest = resident(1)[2]
    priced = tiers.plan(folder, *RANKS[1], f"data.max_length={longest}", "memory.disk=scratch")["bytes"]    # libraries: with the disk's ring
    needs = priced["total"]
    group = {"memory.max": needs + 8 * MIB, "memory.current": 10 * MIB, "memory.stat": f"anon {8 * MIB}\ninactive_file {MIB}\nactive_file {MIB}"}
    before = in_fake_group(group)
    # The file cache is given up for who needs it.
    facts = json.loads(tiers.run(folder, *RANKS[1], "--json", verb="plan", before=before).stdout)
    assert facts["machine"]["memory_bytes"] == facts["bytes"]["budget"] == needs and facts["machine"]["in_control_group"] is True
    least = in_fake_group(group | {"memory.max": 8 * MIB + needs // 3})
    done = tiers.run(folder, *RANKS[1], f"data.max_length={longest}", code=WILL_NOT_FIT, before=least)
    assert re.search(r"^needs \S+ \S+ for the one rank, \S+ \S+ free in this control group, \S+ \S+ of it for a plan: ", done.stderr, re.MULTILINE), done.stderr
    # What the disk can take makes it fit.
    tiers.clear(folder)
    room = int(tiers.device_room(priced, 70).removeprefix("memory.device="))
    little = in_fake_group(group | {"memory.max": 8 * MIB + room})
    assert "in this control group" not in tiers.run(folder, *RANKS[1], "memory.disk=scratch", before=little).stderr
    assert tiers.saved(folder) == resident(1)[1]
    throttled = in_fake_group(group | {"memory.high": 9 * MIB})
    assert json.loads(tiers.run(folder, *RANKS[1], "--json", verb="plan", before=throttled).stdout)["machine"]["memory_bytes"] == MIB


@contextlib.contextmanager
def group_of(limit_bytes):
    """A control group of this kernel, of either version, within this process's own: its folder. Skips where none can be made."""
    lines = [line.split(":", 2) for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines()]
    first = next((path for _, controllers, path in lines if "memory" in controllers.split(",")), None)
    if first is not None:
        parent, name = pathlib.Path("/sys/fs/cgroup/memory" + first), "memory.limit_in_bytes"
    else:
        parent, name = pathlib.Path("/sys/fs/cgroup" + next(path for number, _, path in lines if number == "0")), "memory.max"
    group = parent / f"ulysses-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as e:
        pytest.skip(f"no control group can be made here: {e}")
    try:
        try:
            (group / name).write_text(str(limit_bytes))
        except OSError as e:
            pytest.skip(f"the control group takes no limit: {e}")
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text().strip(), "processes stay in the group")
        group.rmdir()


def within(group):
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]


def test_a_second_job_sees_what_the_first_has_left(folder):
    """Both in a group that has room for one."""
    fixtures.config(folder, "vocab_size=150000")
    run = [*RANKS[1], "checkpoint=[]", "min_iterations=100000"]
    try:
        needs = tiers.plan(folder, *run)["bytes"]["total"]
        assert needs > 100 * MIB
        with group_of(needs * 3 // 2) as group:
            free = json.loads(tiers.run(folder, *run, "--json", verb="plan", before=within(group)).stdout)["machine"]["memory_bytes"]
            assert needs * 1.3 < free <= needs * 1.5
            with open(folder / "said", "w") as said:
                job = subprocess.Popen([*within(group), *tiers.command(*run, "train_log_metrics_path=first.jsonl")], cwd=folder, env=fixtures.environment(), stderr=said)
            try:
                wait_for(lambda: "Train iter" in (folder / "said").read_text() or job.poll() is not None, "no step was made")
                assert job.poll() is None, (folder / "said").read_text()
                done = tiers.run(folder, *run, code=WILL_NOT_FIT, before=within(group))
                assert re.search(r"^needs \S+ \S+ for the one rank, \S+ \S+ free in this control group, \S+ \S+ of it for a plan: ", done.stderr, re.MULTILINE), done.stderr
            finally:
                job.kill()
                job.wait()
            wait_for(lambda: not (group / "cgroup.procs").read_text().strip(), "ranks outlive their launcher")
            assert tiers.plan(folder, *run)["fits"]
            again = json.loads(tiers.run(folder, *run, "--json", verb="plan", before=within(group)).stdout)
            assert again["fits"] and again["machine"]["memory_bytes"] > needs * 1.2
    finally:
        fixtures.config(folder, "vocab_size=320")
