"""What the program makes of a machine's GPUs, played by a driver's library of our own (fake_nvml.cc)."""

import json
import os
import pathlib
import subprocess
import time

import pytest

import fixtures

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build")).resolve() / "ulysses"
H200 = fixtures.gpu()
H100 = fixtures.gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.6, 79.1)
V100 = fixtures.gpu("Tesla V100-SXM2-16GB", (7, 0), 16, 15.5)
A100 = fixtures.gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80, 79.5)
NO_GPU_PART = "--device cuda: this build has no GPU part (libulysses_cuda.so is missing beside ulysses): run `make build` with ULYSSES_CUDA=ON"
BF16 = "model.dtype=bf16"


class Machine:
    """A folder with the tiny recipe, and the program with a GPU part or without."""

    def __init__(self, folder):
        self.folder = folder
        fixtures.tiny(folder)
        self.with_gpu_part = fixtures.program_with_gpu_part(ULYSSES, folder)
        (folder / "bare").mkdir()
        self.without_gpu_part = folder / "bare" / "ulysses"
        os.link(self.with_gpu_part, self.without_gpu_part)
        # Stands for the engine and for the Python side: neither is reached by what is refused.
        self.stop = {"ULYSSES_ENGINE": "/bin/false", "ULYSSES_PYTHON": "/bin/false"}

    def run(self, *arguments, gpus=(), gpu_part=True, **more):
        program = self.with_gpu_part if gpu_part else self.without_gpu_part
        environment = fixtures.environment(**{**self.stop, **fixtures.fake_gpus(*gpus), **more})
        done = subprocess.run([str(program), *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    def doctor(self, *gpus, **more):
        return json.loads(self.run("doctor", "--json", gpus=gpus, **more)[1])


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# --- what is refused


@pytest.mark.parametrize("gpus, more, said", [
    ([], {}, "--device cuda: no GPU is visible: this machine has none"),
    ([H200, H200], {"CUDA_VISIBLE_DEVICES": ""}, "--device cuda: no GPU is visible: CUDA_VISIBLE_DEVICES= shows none"),
    ([H200, H200], {"CUDA_VISIBLE_DEVICES": "2"}, "--device cuda: no GPU is visible: CUDA_VISIBLE_DEVICES=2 shows none"),
    ([H200], {}, "2 ranks need as many GPUs on this machine; this machine shows 1"),
    ([H200, H200], {"CUDA_VISIBLE_DEVICES": "GPU-1"}, "2 ranks need as many GPUs on this machine; CUDA_VISIBLE_DEVICES=GPU-1 shows 1"),
    ([V100, H200], {}, "GPU 0 (Tesla V100-SXM2-16GB) is sm_70: expected sm_80 or newer; use --device cpu or another GPU"),
    ([H200, V100], {"CUDA_VISIBLE_DEVICES": "1,0"}, "GPU 1 (Tesla V100-SXM2-16GB) is sm_70: expected sm_80 or newer; use --device cpu or another GPU"),
    ([H200, "!"], {}, "GPU 1 does not answer: GPU is lost; CUDA_VISIBLE_DEVICES can choose others"),
    ([H200, H200], {"FAKE_NVML_DRIVER": "535.104.05;12020"}, "the driver 535.104.05 supports CUDA 12.2: expected CUDA 13.0, which needs driver 580 or newer"),
    ([H200, H200], {"gpu_part": False}, NO_GPU_PART),
    ([H200, A100], {}, "model.dtype (run.yml:5): attention on a GPU computes in bf16: expected bf16, or --device cpu"),
])
def test_what_cannot_train_on_gpus_is_said_in_one_sentence(machine, gpus, more, said):
    assert machine.run("train", "run.yml", "--device", "cuda", gpus=gpus, **more) == (2, "", said + "\n")


def test_a_gpu_that_is_not_used_may_be_old_or_lost(machine):
    code, _, err = machine.run("train", "run.yml", "--device", "cuda", gpus=[H200, H200, V100, "!"])
    assert (code, err.split(" (")[0]) == (2, "model.dtype")    # the recipe is what remains


def test_a_driver_that_fails_is_quoted(machine):
    # Where the driver fails, device files say how many GPUs there are; here there are none, or they are real.
    answer = machine.doctor(FAKE_NVML_INIT="18")
    assert answer["gpus"]["driver"] == {"version": "", "cuda_version": 0, "why_not_known": "Driver/library version mismatch"}
    assert answer["device"]["default"] == "cpu"


# --- what is chosen


@pytest.mark.parametrize("gpus, more, said", [
    ([H200, H200], {}, "device: cuda (2 x NVIDIA H200, 139.8 GiB each)"),
    ([H200, H100], {}, "device: cuda (1 x NVIDIA H200, 139.8 GiB and 1 x NVIDIA H100 80GB HBM3, 79.6 GiB)"),
    ([H200], {"ULYSSES_SHARE_GPU": "1"}, "device: cuda (1 x NVIDIA H200, 139.8 GiB)"),
    ([], {}, "device: cpu (no GPU is visible: this machine has none)"),
    ([H200], {"CUDA_VISIBLE_DEVICES": ""}, "device: cpu (no GPU is visible: CUDA_VISIBLE_DEVICES= shows none)"),
    ([H200], {}, "device: cpu (2 ranks need as many GPUs on this machine; this machine shows 1)"),
    ([V100, V100], {}, "device: cpu (GPU 0 (Tesla V100-SXM2-16GB) is sm_70)"),
    ([H200, H200], {"FAKE_NVML_DRIVER": "535.104.05;12020"}, "device: cpu (the driver 535.104.05 supports CUDA 12.2)"),
    ([H200, H200], {"gpu_part": False}, "device: cpu (this build has no GPU part (libulysses_cuda.so is missing beside ulysses))"),
])
def test_without_device_gpus_are_used_where_they_can_be_and_the_choice_is_said(machine, gpus, more, said):
    assert machine.run("train", "run.yml", BF16, gpus=gpus, **more)[2].splitlines()[0] == said


def test_a_recipe_in_fp32_trains_on_the_cpu_and_says_why(machine):
    err = machine.run("train", "run.yml", gpus=[H200, H200])[2]
    assert err.splitlines()[0] == "device: cpu (model.dtype (run.yml:5): attention on a GPU computes in bf16)"


def test_a_plan_is_for_the_device_that_training_would_choose(machine):
    def plan(*arguments, **more):
        code, out, err = machine.run("plan", "run.yml", BF16, "--json", *arguments, **more)
        assert code == 0, err
        return json.loads(out)["mesh"]["device"], err

    assert plan(gpus=[H200, H200]) == ("cuda", "")
    assert plan(gpus=[]) == ("cpu", "")
    assert plan(gpus=[H200]) == ("cpu", "device: cpu (2 ranks need as many GPUs on this machine; this machine shows 1)\n")
    assert plan("--device", "cpu", gpus=[H200, H200]) == ("cpu", "")


# --- what is planned


@pytest.mark.parametrize("gpus", [[H200, H200], [H200], [V100], []])
def test_a_plan_for_gpus_is_made_whatever_this_machine_has(machine, gpus):
    code, out, err = machine.run("plan", "run.yml", "--device", "cuda", BF16, gpus=gpus, gpu_part=False)
    assert (code, err) == (0, "")
    assert "2 ranks on GPUs" in out and "\nmemory " in out


def gpu_facts(machine, *arguments, gpus, **more):
    code, out, err = machine.run("plan", "run.yml", "--device", "cuda", BF16, "--json", *arguments, gpus=gpus, **more)
    assert code == 0, err
    return json.loads(out)["machine"]["gpu"]


def test_the_plan_is_for_the_least_that_a_used_gpu_has(machine):
    facts = gpu_facts(machine, gpus=[H200, fixtures.gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80, 60), V100])
    assert facts["words"] == "1 x NVIDIA H200, 139.8 GiB and 1 x NVIDIA A100-SXM4-80GB, 80.0 GiB"
    assert (facts["name"], facts["capability"]) == ("NVIDIA A100-SXM4-80GB", [8, 0])
    assert (facts["total_bytes"], facts["free_bytes"], facts["ranks"]) == (80 * 2**30, 60 * 2**30, 1)
    assert facts["foreign"]["bytes"] == 20 * 2**30    # nobody is seen to hold it


def test_ranks_that_share_a_gpu_are_counted(machine):
    assert gpu_facts(machine, "--num_gpus", "4", gpus=[H200], ULYSSES_SHARE_GPU="1")["ranks"] == 4
    assert gpu_facts(machine, "--num_gpus", "6", gpus=[H200] * 4, ULYSSES_SHARE_GPU="1")["ranks"] == 2
    assert gpu_facts(machine, "--num_gpus", "4", gpus=[H200])["ranks"] == 1    # for another machine, that has four


@pytest.mark.parametrize("free, processes, words, held, pid", [
    (139.3, [], "", 0, 0),
    (133.5, [(4411, 5.8)], "GPU 0: 5.8 GiB belong to process 4411", 5.8, 4411),
    (133.5, [(4411, 1), (4412, 4.8)], "GPU 0: 5.8 GiB belong to 2 other processes, most to process 4412", 5.8, 4412),
    (133.5, [(4411, None)], "GPU 0: process 4411 computes on it too", 0, 4411),
    (133.5, [], "GPU 0: 6.3 GiB belong to processes that cannot be seen from here", 6.3, 0),
])
def test_the_plan_knows_what_other_processes_hold(machine, free, processes, words, held, pid):
    foreign = gpu_facts(machine, gpus=[fixtures.gpu(free=free, processes=processes), H200])["foreign"]
    assert (foreign["words"], foreign["pid"]) == (words, pid)
    assert abs(foreign["bytes"] - held * 2**30) < 4


def test_a_plan_refuses_what_no_gpu_can_train(machine):
    said = "model.dtype (run.yml:5): attention on a GPU computes in bf16: expected bf16, or --device cpu\n"
    assert machine.run("plan", "run.yml", "--device", "cuda", gpus=[H200, H200]) == (2, "", said)


def test_asking_for_the_gpus_takes_no_time(machine):
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        machine.run("plan", "run.yml", "--device", "cuda", BF16, gpus=[H200] * 8)
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.2


# --- what is seen


def test_doctor_tells_what_the_driver_knows(machine):
    busy = fixtures.gpu(free=133.5, processes=[(4411, 5.8), (4412, None)])
    answer = machine.doctor(H100, busy)
    assert answer["gpus"]["in_machine"] == answer["gpus"]["visible"] == 2
    assert answer["gpus"]["driver"] == {"version": "580.65.06", "cuda_version": 13000, "why_not_known": ""}
    assert answer["device"] == {"default": "cuda", "why": ""}
    first, second = answer["gpus"]["list"]
    assert first["name"] == "NVIDIA H100 80GB HBM3" and first["capability"] == [9, 0] and first["processes"] == []
    assert second["index"] == 1 and second["uuid"] == "GPU-177-aaaa"
    assert (second["total_bytes"], second["free_bytes"]) == (int(139.8 * 2**30), int(133.5 * 2**30))
    assert second["processes"] == [{"pid": 4411, "bytes": int(5.8 * 2**30)}, {"pid": 4412, "bytes": 0}]
    lines = machine.run("doctor", gpus=[H100, busy])[1].splitlines()
    assert "GPUs      2 visible of 2" in lines and "driver    580.65.06, CUDA 13.0" in lines and "device    cuda" in lines
    assert "          GPU 1: NVIDIA H200, sm_90, 139.8 GiB, 133.5 GiB free; process 4411 holds 5.8 GiB; process 4412 holds an unknown part" in lines


def test_more_processes_than_are_asked_for_at_first_are_all_seen(machine):
    crowded = fixtures.gpu(processes=[(pid, 0.1) for pid in range(1, 101)])
    assert len(machine.doctor(crowded)["gpus"]["list"][0]["processes"]) == 100


@pytest.mark.parametrize("visible, seen", [
    (None, [0, 1, 2]),
    ("2,0", [2, 0]),
    (" 1 , 2 ", [1, 2]),
    ("GPU-277-aaaa,0", [2, 0]),
    ("GPU-1", [1]),
    ("GPU-", []),              # means three
    ("GPU-9,0", []),           # the list ends at what does not exist
    ("0,5,1", [0]),
    ("0,GPU-077", []),         # one GPU twice
    ("1,1", []),
    ("", []),
    ("-1", []),
    ("MIG-5b,1", [-1, 1]),     # a part of a GPU
])
def test_cuda_visible_devices_chooses_by_number_and_uuid(machine, visible, seen):
    answer = machine.doctor(H200, H100, A100, CUDA_VISIBLE_DEVICES=visible)["gpus"]
    assert [gpu["index"] for gpu in answer["list"]] == seen
    assert (answer["in_machine"], answer["visible"]) == (3, len(seen))
