"""bench/faults.py [--seed N] [--only WORD] [--json bench/results/faults.jsonl]; bench/faults.py --table bench/results/faults.jsonl

What goes wrong with a run, at random moments: a rank, the launcher or a machine's sshd is killed, a rank is stopped, a signal comes, a link goes
down, a disk fills up, a rank is killed at each of the calls that saving consists of, bytes of a saved state change. Each time: does the run end with the
right exit code and sentence, in time, with no process left behind; is the state that it goes on from no older than the last that was saved; and is the
run that goes on, bit by bit, the one that nothing happened to (losses, norms, learning rates, steps in the metrics file, weights)?

A tiny model on the CPU (ULYSSES_TEST_DEVICE=cuda: on GPUs, see tests/cases/fixtures.py), two ranks; on one machine, or on two that are network namespaces with an sshd each (root only, else left out).
"""

import argparse
import collections
import contextlib
import datetime
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cases"), str(ROOT / "tests" / "cluster")]

import fixtures  # noqa: E402
import machines  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"
STEPS, EVERY = 40, 3
RECIPE = fixtures.RECIPE.replace("checkpoint:\n  type: huggingface\n  output_dir: out\n  save_end_of_training: true\n", f"""\
checkpoint:
  - {{type: huggingface, output_dir: out, save_end_of_training: true}}
  - {{output_dir: states, save_every_n_steps: {EVERY}, save_total_limit: 3, auto_resume: true}}
epochs: 8
gradient_accumulation_steps: 2
""")
CHATS = 9
TOLD = ("iter", "epoch", "loss", "grad_norm", "lr", "seqlen", "tokens", "trained_tokens")


class Wrong(Exception):
    """What was not as it should be."""


def check(condition, words):
    if not condition:
        raise Wrong(words)


class TooLate(Exception):
    """The run was over before anything could happen to it."""


class Run:
    """One run in a folder of its own, from its start to the end of the run that goes on."""

    def __init__(self, folder, hosts=None, ssh=None):
        self.folder, self.hosts, self.ssh = folder, hosts, ssh
        fixtures.tiny(folder, CHATS)
        (folder / "run.yml").write_text(RECIPE)
        if hosts:
            (folder / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        self.process = None

    def start(self, *arguments, **environment):
        where, path = [], os.environ["PATH"]
        if self.hosts:
            where, path = ["-H", "hostfile", "--ssh_port", str(self.hosts[0].port)], f"{self.ssh}/bin:{path}"
        self.said = open(self.folder / "said", "w+")
        self.process = subprocess.Popen([str(ULYSSES), "run.yml", *fixtures.ON_DEVICE, *where, *map(str, arguments)], cwd=self.folder, env=fixtures.environment(PATH=path, **environment),
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.said)

    def wait(self, seconds):
        """Returns its exit code and what it said."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Wrong(f"it had not ended after {seconds} s") from None
        self.said.seek(0)
        return self.process.returncode, self.said.read()

    def until(self, done, seconds=90):
        end = time.monotonic() + seconds
        while not done():
            if self.process.poll() is not None:
                raise TooLate
            check(time.monotonic() < end, "it came no further")
            time.sleep(0.005)

    def ranks(self):
        return fixtures.ranks_in(self.folder)

    def left(self):
        """Processes of ours that are still there."""
        return [place.name for place in fixtures.processes_in(self.folder, "")]

    def told(self):
        with contextlib.suppress(OSError, ValueError):  # half of a line
            return [tuple(json.loads(line)[key] for key in TOLD) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return []

    def weights(self):
        return fixtures.read_weights(self.folder / "out" / f"global_step_{STEPS}")

    def saved(self):
        """The step of the last state that was saved, which `latest` says; 0 before the first."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "states" / "latest").read_text().split("_")[-1])
        return 0

    def clean_up(self):
        for pid in self.left():
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# What happens: a function of (run, random) that makes it happen to a run which it starts, and returns what is expected:
# exit codes, a pattern of the sentence, seconds from then on, and a word on when it was.
Expected = collections.namedtuple("Expected", "codes sentence seconds when", defaults=("",))


def some_moment(run, rng):
    """While ranks load or after a random step; returns which."""
    run.until(lambda: len(run.ranks()) == 2)
    step = rng.randrange(-4, STEPS - 3)
    if step <= 0:
        time.sleep(rng.uniform(0, 0.5))
        return "while ranks load or in the first step"
    run.until(lambda: len(run.told()) >= step)
    time.sleep(rng.uniform(0, 0.03))
    return f"after step {step}"


def kill(pid, sent=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sent)


def a_rank(run, rng):
    ranks = run.ranks()
    if len(ranks) < 2:
        raise TooLate
    return rng.choice(sorted(ranks.items()))


def kill_rank(run, rng):
    run.start()
    when = some_moment(run, rng)
    rank, pid = a_rank(run, rng)
    kill(pid)
    return Expected({75}, rf"^(\[\S+\] )?rank {rank} \(pid {pid}\) was killed by signal 9 \(SIGKILL\)", 30, f"rank {rank}, {when}")


def kill_rank_restarts(run, rng):
    run.start("--max_restarts", 3)
    when = some_moment(run, rng)
    rank, pid = a_rank(run, rng)
    kill(pid)
    return Expected({0}, r"^restart 1 of 3, in ", 90, f"rank {rank}, {when}")


def kill_launcher(run, rng):
    run.start()
    when = some_moment(run, rng)
    kill(run.process.pid)
    return Expected({-9}, "", 5, when)


def signalled(sent):
    def happens(run, rng):
        run.start()
        when = some_moment(run, rng)
        whom = rng.choice(["launcher", 0, 1]) if not run.hosts or sent != signal.SIGUSR1 else "launcher"
        kill(run.process.pid if whom == "launcher" else a_rank(run, rng)[1], sent)
        early = "|stopped before the first step; start again" if "load" in when else ""
        return Expected({85}, rf"^(signal {int(sent)}: stopping after step \d+{early})$", 30, f"{'launcher' if whom == 'launcher' else 'a rank'}, {when}")

    return happens


def stopped_rank(run, rng):
    run.start()
    when = some_moment(run, rng)
    run.until(lambda: len(run.told()) >= 1)  # they know each other
    rank, pid = a_rank(run, rng)
    kill(pid, signal.SIGSTOP)
    threading.Timer(60, kill, (pid, signal.SIGCONT)).start()
    return Expected({75}, rf"rank {rank}( \(pid {pid} on [^)]*\))?: no sign of life for 20 s: ", 40, f"rank {rank}, {when}")


def stopped_for_a_moment(run, rng):
    run.start()
    when = some_moment(run, rng)
    rank, pid = a_rank(run, rng)
    kill(pid, signal.SIGSTOP)
    time.sleep(rng.uniform(1, 8))
    kill(pid, signal.SIGCONT)
    return Expected({0}, "", 60, f"rank {rank}, {when}")


# One save's calls, by rank: `make_log` finds how many there are.
def kill_in_save(run, rng, at=None):
    rank, n = at or (rng.randrange(2), rng.randrange(1, 120))
    run.start(LD_PRELOAD=str(preload()), FAULT_PLACE="states", FAULT_RANK=str(rank), FAULT_AT=str(n), FAULT_WHAT="kill", FAULT_LOG=str(run.folder / "calls"))
    code, said = run.wait(90)
    if code == 0:
        raise TooLate
    call = (run.folder / "calls").read_text().splitlines()[-1].split()
    place = re.sub(r"\d+", "N", os.path.relpath(os.path.join(run.folder, call[2]), run.folder / "states"))
    return Expected({75}, rf"^rank {rank} \(pid \d+\) was killed by signal 9 ", 30, f"rank {rank}, {call[1]} {place}")


def full_in_save(run, rng):
    """No room for anything any more, from a random call on."""
    rank, n = rng.choice([(0, rng.randrange(2, 250)), (1, rng.randrange(1, 150))])
    run.start(LD_PRELOAD=str(preload()), FAULT_PLACE="states", FAULT_RANK=str(rank), FAULT_AT=str(n), FAULT_WHAT="full")
    return Expected({2}, r"^SAVING states/global_step_\d+ FAILED: .*(No space left on device|no room on disk).*; training goes on", 60, f"rank {rank}, from call {n} on")


def full_disk(run, rng):
    """A small file system that is filled at a random moment; there is room again for the run that goes on."""
    (run.folder / "states").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", run.folder / "states"], capture_output=True).returncode != 0:
        raise machines.Unavailable("only root mounts a small disk")
    run.mounted = run.folder / "states"
    run.start()
    when = some_moment(run, rng)
    with contextlib.suppress(OSError), open(run.mounted / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    run.before_going_on = lambda: (run.mounted / "filler").unlink(missing_ok=True)
    return Expected({0, 2} if len(run.told()) > STEPS - 2 * EVERY else {2}, r"^SAVING states/global_step_\d+ FAILED: .*(no room|No space).*; training goes on", 60, when)


def flipped_bytes(run, rng):
    """Some bits of the newest state, or of `latest`, after the run was stopped there."""
    steps = rng.randrange(2 * EVERY, STEPS - 1)
    run.start(f"exit_iteration_this_run={steps}", "checkpoint.0.save_end_of_training=false")
    code, said = run.wait(90)
    check(code == 0, said[-500:])
    run.known = run.saved()
    newest = run.folder / "states" / f"global_step_{run.known}"
    path = rng.choice([*newest.iterdir(), *newest.iterdir(), run.folder / "states" / "latest"])
    content = bytearray(path.read_bytes())
    places = sorted({rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 1, 16]))})
    for at in places:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    run.damaged = path
    return Expected({0}, "", 0, f"{len(places)} byte{'s' * (len(places) > 1)} of {'latest' if path.name == 'latest' else path.name}")


def kill_sshd(run, rng):
    run.start()
    when = some_moment(run, rng)
    host = rng.choice(run.hosts)
    host.kill_sshd()
    run.before_going_on = lambda: revive(host)
    return Expected({75}, rf"^{host.address}: the connection was lost; ", 45, when)


def link_down(run, rng):
    run.start()
    when = some_moment(run, rng)
    host = rng.choice(run.hosts)
    host.link(False)
    run.before_going_on = lambda: host.link(True)
    return Expected({75}, rf"{host.address}", 45, when)


def revive(host):
    if host.sshd.poll() is not None:
        host.start_sshd()
    for _ in range(100):
        if host.answers():
            return
        time.sleep(0.1)


HERE = {
    "kill -9 of a rank": (kill_rank, 24),
    "kill -9 of a rank, --max_restarts": (kill_rank_restarts, 12),
    "kill -9 of the launcher": (kill_launcher, 16),
    "SIGTERM": (signalled(signal.SIGTERM), 14),
    "SIGINT": (signalled(signal.SIGINT), 8),
    "SIGUSR1": (signalled(signal.SIGUSR1), 8),
    "SIGSTOP for a minute": (stopped_rank, 6),
    "SIGSTOP for up to 8 s": (stopped_for_a_moment, 6),
    "kill -9 within a save": (kill_in_save, 60),
    "disk full, by the system call": (full_in_save, 16),
    "disk full, a small file system": (full_disk, 10),
    "flipped bytes in a state": (flipped_bytes, 18),
}
THERE = {
    "kill -9 of a rank, two machines": (kill_rank, 8),
    "kill -9 of a rank, two machines, --max_restarts": (kill_rank_restarts, 3),
    "kill -9 of the launcher, two machines": (kill_launcher, 6),
    "kill -9 of a machine's sshd": (kill_sshd, 10),
    "SIGTERM, two machines": (signalled(signal.SIGTERM), 5),
    "SIGSTOP for a minute, two machines": (stopped_rank, 4),
    "link down": (link_down, 8),
}


_preload = []


def preload():
    if not _preload:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="ulysses-faults-"))
        library = folder / "fault_at.so"
        subprocess.run([shutil.which("cc") or "gcc", "-O1", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "cluster" / "fault_at.c", "-ldl"], check=True)
        _preload.append(library)
    return _preload[0]


def undisturbed(folder):
    run = Run(folder)
    run.start()
    code, said = run.wait(120)
    check(code == 0 and len(run.told()) == STEPS, said[-500:])
    return run.told(), run.weights()


def one_event(folder, happens, rng, expected_end, hosts=None, ssh=None, **more):
    """Makes it happen, checks all that was promised, returns what to tell of it. Raises Wrong, TooLate."""
    run = Run(folder, hosts, ssh)
    run.mounted = run.damaged = run.known = expected = None
    run.before_going_on = lambda: None
    told, weights = expected_end
    try:
        expected = happens(run, rng, **more)
        began = time.monotonic()
        saved = run.saved()
        code, said = run.wait(max(1, expected.seconds))
        seconds = time.monotonic() - began
        if code == 0 and 0 not in expected.codes and len(run.told()) == STEPS:
            raise TooLate
        check(code in expected.codes, f"exit code {code}, expected {expected.codes}: {said[-700:]}")
        check(code == 0 and 0 in expected.codes and 2 in expected.codes or re.search(expected.sentence, said, re.MULTILINE), f"no sentence {expected.sentence}: {said[-700:]}")
        check("Traceback" not in said and "internal error" not in said, said[-700:])
        if code == 75:
            causes = [line for line in said.splitlines() if re.search("was killed by signal 9|no sign of life|connection was lost|failed at rank|heard nothing", line)]
            check(len(causes) == 1, f"told {len(causes)} times: {causes}")
        while run.left():
            check(time.monotonic() - began < expected.seconds + 40, f"left behind: {run.left()}")
            time.sleep(0.05)
        alone = time.monotonic() - began
        saved = run.known or max(saved, run.saved())
        run.before_going_on()
        run.start()
        code, said = run.wait(120)
        check(code == 0, f"going on: exit code {code}: {said[-700:]}")
        found = re.search(r"going on from states/global_step_\d+: step ([\d,]+), ", said)
        resumed = int(found[1].replace(",", "")) if found else 0
        if run.damaged and run.damaged.name != "latest":
            check("DAMAGED: " in said or resumed == saved, "the damage was not seen")
            check(resumed >= saved - EVERY, f"went on from {resumed}, saved was {saved}")
        else:
            check(resumed >= saved, f"went on from {resumed}, saved was {saved}")
        # A run that came to its end and could save nothing is told of beside the one that begins anew.
        twice = expected.codes != {75} and 2 in expected.codes and resumed == 0
        check(run.told() == (told + told if twice else told), "metrics are not those of the undisturbed run")
        ours = run.weights()
        check(ours.keys() == weights.keys() and all(np.array_equal(ours[name], weights[name]) for name in weights), "weights are not those of the undisturbed run")
        return {"when": expected.when, "seconds": round(seconds, 2), "gone_after": round(alone, 2), "saved": saved, "resumed": resumed}
    except Wrong as wrong:
        raise Wrong(f"{expected.when if expected else ''}: {wrong}") from None
    finally:
        run.clean_up()
        if hosts:
            run.before_going_on()
            for host in hosts:
                revive(host)
        if run.mounted:
            subprocess.run(["umount", "-l", run.mounted], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def events(kinds, rng, only):
    plan = [(kind, happens) for kind, (happens, times) in kinds.items() for _ in range(times) if not only or only in kind]
    rng.shuffle(plan)
    return plan


class Campaign:
    def __init__(self, arguments):
        self.arguments, self.rows, self.lock = arguments, [], threading.Lock()
        self.base = pathlib.Path(tempfile.mkdtemp(prefix="ulysses-faults-"))
        self.machine, self.command = f"{os.cpu_count()} cores, {platform.machine()}", "bench/faults.py"
        if fixtures.DEVICE == "cuda":
            names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout.split("\n")
            self.machine, self.command = f"{len(names) - 1} x {names[0]}, {self.machine}", f"ULYSSES_TEST_DEVICE=cuda {self.command}"

    def tell(self, row):
        with self.lock:
            self.rows.append(row)
            if row["wrong"]:
                print(f"WRONG: {row['event']}: {row['when']}: {row['wrong']}", flush=True)
            if self.arguments.json:
                with open(self.arguments.json, "a") as file:
                    file.write(json.dumps(row) + "\n")

    def go(self, name, plan, seed, end, hosts=None, ssh=None):
        # The calls of a save are gone through in turn, so that each is met.
        calls = iter([(rank, n) for n in range(1, 200) for rank in ((0, 1) if n <= 60 else (0,))][seed % 2:])
        for i, (kind, happens) in enumerate(plan):
            rng = random.Random(seed * 100003 + i)
            for attempt in range(20):  # until a run was not over before
                folder = self.base / f"{name}{i}-{attempt}"
                folder.mkdir()
                row = {"event": kind, "wrong": None, "when": ""}
                more = {}
                if happens is kill_in_save:
                    rank, n = next(calls)
                    more = {"at": (rank, n)}
                try:
                    row |= one_event(folder, happens, rng, end, hosts, ssh, **more)
                except TooLate:
                    continue
                except machines.Unavailable as why:
                    print(f"left out: {kind}: {why}", flush=True)
                    break
                except Wrong as wrong:
                    row["wrong"] = str(wrong)
                self.tell(row | {"seed": seed, "number": i, "command": self.command, "machine": self.machine, "date": datetime.date.today().isoformat()})
                break

    def run(self):
        arguments = self.arguments
        first = self.base / "undisturbed"
        first.mkdir()
        end = undisturbed(first)
        rng = random.Random(arguments.seed)
        here, there = events(HERE, rng, arguments.only), events(THERE, rng, arguments.only)
        threads = [threading.Thread(target=self.go, args=(f"here{k}-", here[k:: arguments.jobs], arguments.seed * 10 + k, end)) for k in range(arguments.jobs)]
        with contextlib.ExitStack() as stack:
            if there:
                try:
                    folder = self.base / "machines"
                    folder.mkdir()
                    hosts = stack.enter_context(machines.machines(folder))
                    threads.append(threading.Thread(target=self.go, args=("there-", there, arguments.seed * 10 + 9, end, hosts, folder)))
                except machines.Unavailable as why:
                    print(f"left out, two machines: {why}", flush=True)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        shutil.rmtree(self.base, ignore_errors=True)
        print(table(self.rows))
        return sum(row["wrong"] is not None for row in self.rows)


def table(rows):
    kinds = collections.defaultdict(list)
    for row in rows:
        kinds[row["event"]].append(row)
    lines = ["| what happens | times | as promised | went on from the last state saved | over after, at most |", "|---|---|---|---|---|"]
    for kind in [*HERE, *THERE]:
        if of := kinds.get(kind):
            good = [row for row in of if row["wrong"] is None]
            lines.append(f"| {kind} | {len(of)} | {len(good)} | {sum(row['resumed'] >= row['saved'] for row in good)} | {max((row['gone_after'] for row in good), default=0):.0f} s |")
    lines.append(f"| all | {len(rows)} | {sum(row['wrong'] is None for row in rows)} | | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="events on one machine side by side")
    parser.add_argument("--only", default="", help="events with this in their name")
    parser.add_argument("--json", help="file for a row an event")
    parser.add_argument("--table", help="print the table of such a file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in pathlib.Path(arguments.table).read_text().splitlines()]))
        return 0
    return 1 if Campaign(arguments).run() else 0


if __name__ == "__main__":
    sys.exit(main())
