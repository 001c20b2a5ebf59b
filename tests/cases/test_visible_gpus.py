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

    def call(*arguments, visible=None):
        more = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        command = [*own, "sh", "-c", WITH_GPUS + shlex.join([str(ULYSSES), *arguments])]
        done = subprocess.run(command, cwd=tmp_path, env=fixtures.environment(**more), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
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
