"""GPUs that CUDA_VISIBLE_DEVICES shows or hides, on a machine that seems to have two: device files in a /dev of our own."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

import fixtures

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build")).resolve() / "ulysses"
WITH_GPUS = "mount -t tmpfs tmpfs /dev && touch /dev/nvidia0 /dev/nvidia1 && mknod -m 666 /dev/null c 1 3 2>/dev/null; exec "


@pytest.fixture
def run(tmp_path):
    fixtures.tiny(tmp_path)
    own = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    if shutil.which("unshare") is None or subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", "/dev"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")

    def call(*arguments, visible=None, **more):
        command = [*own, "sh", "-c", WITH_GPUS + shlex.join([str(ULYSSES), *arguments])]
        done = subprocess.run(command, cwd=tmp_path, env=fixtures.environment(**{"CUDA_VISIBLE_DEVICES": visible, **more}), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.mark.parametrize("visible, ranks, said", [
    ("1", 2, "2 ranks need as many GPUs on this machine; CUDA_VISIBLE_DEVICES=1 shows 1"),
    ("", 2, "--device cuda: no GPU is visible: CUDA_VISIBLE_DEVICES= shows none"),
    ("-1", 2, "--device cuda: no GPU is visible: CUDA_VISIBLE_DEVICES=-1 shows none"),
    ("0,7", 2, "2 ranks need as many GPUs on this machine; CUDA_VISIBLE_DEVICES=0,7 shows 1"),
    (None, 4, "4 ranks need as many GPUs on this machine; this machine shows 2"),
])
def test_a_recipe_that_needs_more_ranks_than_are_visible_says_so_and_names_the_variable(run, visible, ranks, said):
    code, _, err = run("train", "run.yml", "--device", "cuda", "--num_gpus", str(ranks), visible=visible)
    assert (code, err) == (2, said + "\n")


def test_doctor_counts_what_is_visible(run):
    assert "GPUs      1 visible of 2, CUDA_VISIBLE_DEVICES=1" in run("doctor", visible="1")[1]


def test_a_driver_that_does_not_answer_is_quoted(run):
    failing = fixtures.fake_gpus(FAKE_NVML_INIT="18")
    said = "the driver does not answer: Driver/library version mismatch"
    assert run("train", "run.yml", "--device", "cuda", **failing)[::2] == (2, f"--device cuda: {said}; nvidia-smi may say more\n")
    assert run("plan", "run.yml", **failing)[::2] == (0, f"device: cpu ({said})\n")


def test_where_nothing_tells_what_the_gpus_can_do_they_are_used_only_if_asked_for(run):
    code, _, err = run("plan", "run.yml", "model.dtype=bf16")
    if "the driver does not answer" in err:
        pytest.skip("this machine has a driver")
    assert (code, err.startswith("device: cpu (nothing tells what the GPU can do: libnvidia-ml.so.1: ")) == (0, True)
    # What is checked next is reached.
    assert "this build has no GPU part" in run("train", "run.yml", "--device", "cuda", ULYSSES_ENGINE="/bin/false", ULYSSES_PYTHON="/bin/false")[2] or has_gpu_part()


def has_gpu_part():
    return (ULYSSES.parent / "libulysses_cuda.so").exists()
