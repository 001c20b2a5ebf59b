"""The rates that a machine was measured to have: the file, who uses it, and that measuring works."""

import json
import os
import subprocess

import pytest
import tiers
from tiers import fixtures

NAMES = ["gemm_flops", "attention_forward_flops", "attention_backward_flops", "attention_half_tokens", "device_bytes", "to_host_bytes", "to_device_bytes", "disk_bytes", "host_update_bytes", "sequence_bytes", "node_bytes", "gather_bytes", "scatter_bytes"]
RATES = {name: 1e10 for name in NAMES}


def processor():
    with open("/proc/cpuinfo") as file:
        return next((line.split(": ", 1)[1].rstrip("\n") for line in file if line.startswith("model name")), "")


def rates_file(**changes):
    cpu = {"processor": processor(), "cores": os.cpu_count(), "date": "2026-01-02", "fp32": RATES, "bf16": {**RATES, "gemm_flops": 1e9}, "disks": {}}
    return {"version": 2, "cpu": cpu | changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rates")
    tiers.make_job(folder)
    return folder


def write(folder, content):
    (folder / "rates.json").write_text(content if isinstance(content, str) else json.dumps(content))


def plan(folder, *arguments):
    return tiers.run(folder, *arguments, verb="plan", ULYSSES_RATES="rates.json").stdout


def facts(folder, *arguments):
    return json.loads(plan(folder, "--json", *arguments))


def test_a_plan_for_the_cpu_has_seconds_once_it_was_measured(folder):
    (folder / "rates.json").unlink(missing_ok=True)
    assert "time" not in facts(folder) and "\ntime " not in plan(folder)
    write(folder, rates_file())
    said, found = plan(folder), facts(folder)
    assert "from rates measured on this machine on 2026-01-02 (rates.json)" in said and "tokens/s" in said
    assert found["time"]["seconds"] > 0 and found["time"]["measured"] is True and found["time"]["rates"]["gemm_flops"] == 1e10
    # Ranks share what a machine has, but for what they exchange.
    two = facts(folder, "sequence_parallel_size=2")["time"]["rates"]
    assert two["gemm_flops"] == two["host_update_bytes"] == 5e9 and two["sequence_bytes"] == 1e10
    assert facts(folder, "model.dtype=bf16")["time"]["rates"]["gemm_flops"] == 1e9


def test_folders_have_the_rate_of_the_slowest(folder):
    (folder / "other").mkdir(exist_ok=True)
    write(folder, rates_file(disks={str(folder / "scratch"): 3e9, str(folder / "other"): 2e9}))
    assert facts(folder, "memory.disk=scratch")["time"]["rates"]["disk_bytes"] == 3e9
    assert facts(folder, "memory.disk=scratch,other/")["time"]["rates"]["disk_bytes"] == 4e9


@pytest.mark.parametrize("changes", [{"processor": "Z80"}, {"cores": 4096}])
def test_the_rates_of_another_machine_are_not_used(folder, changes):
    write(folder, rates_file(**changes))
    assert "time" not in facts(folder)
    assert "are of another machine" in plan(folder) and "not used; `ulysses doctor --measure` measures this one" in plan(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 2, "cpu": {}}', rates_file(fp32=RATES | {"gemm_flops": -1}), rates_file(fp32=RATES | {"gemm_flops": "fast"}), rates_file(fp32={}), "\xff\xfe"])
def test_a_damaged_file_is_named(folder, content):
    write(folder, content)
    done = tiers.run(folder, verb="plan", code=2, ULYSSES_RATES="rates.json")
    assert done.stderr.startswith("rates.json: expected rates ") and "measure again (ulysses doctor --measure), or remove the file" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_plans_with_the_same_rates(folder, ranks):
    write(folder, rates_file())
    run = [f"sequence_parallel_size={ranks}", "memory.host=64MiB"]
    steps, weights, said = tiers.train(folder, *run, ULYSSES_RATES="rates.json")
    assert "from rates measured on this machine" in said
    assert (steps, weights) == tiers.train(folder, *run)[:2]


def test_measuring(folder):
    """The real thing, and what is known of another device stays."""
    gpu = rates_file()["cpu"] | {"processor": "NVIDIA H200"}
    write(folder, {"version": 2, "cuda": gpu})
    command = [str(tiers.ULYSSES), "doctor", "--measure", "--device", "cpu", "--disk", "scratch"]
    done = subprocess.run(command, cwd=folder, env=fixtures.environment(ULYSSES_RATES="rates.json", OMP_NUM_THREADS=None), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("measured ") >= 12 and done.stderr.splitlines()[-1].startswith("rates      rates.json")
    file = json.loads((folder / "rates.json").read_text())
    assert file["cuda"] == gpu and file["cpu"]["processor"] == processor() and file["cpu"]["cores"] == os.cpu_count()
    for kind in ("fp32", "bf16"):
        rates = file["cpu"][kind]
        assert all(rates[name] > 0 for name in NAMES if name not in ("disk_bytes", "attention_half_tokens"))
        assert 1e8 < rates["gemm_flops"] < 1e14 and 1e7 < rates["host_update_bytes"] < 1e12
    assert list(file["cpu"]["disks"]) == [str((folder / "scratch").resolve())] and file["cpu"]["disks"][str((folder / "scratch").resolve())] > 1e6
    assert os.listdir(folder / "scratch") == []
    assert facts(folder)["time"]["seconds"] > 0


@pytest.mark.parametrize("arguments, said", [(["--measure", "--disk", "nowhere"], "--disk: there is no folder nowhere"), (["--disk", "scratch"], "requires"), (["--measure", "--device", "abacus"], "expected cpu or cuda")])
def test_what_must_be_changed_is_said(folder, arguments, said):
    done = subprocess.run([str(tiers.ULYSSES), "doctor", *arguments], cwd=folder, env=fixtures.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
