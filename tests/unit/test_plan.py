"""What `ulysses plan` prints and can be asked, through the real program: no GPU, no engine, no Python side."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

import fixtures  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"
RECIPE = """\
model: {name_or_path: meta-llama/Llama-3.1-8B-Instruct}
data:
  sources: [chats.jsonl]
  max_length: 128k
sequence_parallel_size: 1
"""
H200 = ["--gpu", "H200", "--host-memory", "125GiB", "--host-cores", "16"]


class Folder:
    def __init__(self, path):
        self.path = path
        (path / "run.yml").write_text(RECIPE)

    def run(self, *arguments, program=ULYSSES, **more):
        environment = fixtures.environment(ULYSSES_PYTHON="/nowhere", ULYSSES_ENGINE="/nowhere", **more)
        return subprocess.run([str(program), "plan", "run.yml", *arguments], cwd=self.path, env=environment, capture_output=True, text=True, timeout=60)

    def text(self, *arguments, **more):
        done = self.run(*arguments, **more)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def facts(self, *arguments, **more):
        return json.loads(self.text(*arguments, "--json", **more))

    def error(self, *arguments, **more):
        done = self.run(*arguments, **more)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
        return done.stderr.rstrip("\n")


@pytest.fixture
def here(tmp_path):
    return Folder(tmp_path)


def under(text, subject):
    """The lines of one subject."""
    found, inside = [], False
    for line in text.splitlines():
        inside = line.startswith(subject + " ") or (inside and line.startswith(" "))
        if inside:
            found.append(line[11:])
    return found


# --- the longest that fits


def test_the_longest_that_fits_is_told_and_is_true(here):
    longest = here.facts(*H200)["longest"]
    assert longest["limited_by"] == "host" and longest["room"] < longest["bytes"] < 1.1 * longest["room"] and longest["largest_bytes"] <= longest["bytes"]
    assert under(here.text(*H200), "longest")[0].startswith(f"{longest['max_length']:,} tokens fit (data.max_length), then the host's memory is too small: {longest['next_length']:,} would take ")
    assert here.facts(*H200, f"data.max_length={longest['max_length']}")["fits"]
    assert not here.facts(*H200, f"data.max_length={longest['max_length'] * 102 // 100}")["fits"]


def test_more_of_what_limits_the_longest_makes_it_longer(here):
    first = here.facts(*H200)["longest"]
    assert here.facts(*H200, "--disk", "200GiB")["longest"]["max_length"] > 1.1 * first["max_length"]
    small = here.facts("--gpu", "H200", "--gpu-memory", "60GiB")["longest"]
    assert small["limited_by"] == "device" and here.facts("--gpu", "H200", "--gpu-memory", "90GiB")["longest"]["max_length"] > 1.3 * small["max_length"]


def test_where_memory_is_not_known_nothing_is_promised(here):
    gpu = {"program": fixtures.program_with_gpu_part(ULYSSES, here.path), **fixtures.fake_gpus(fixtures.gpu(gib=0, free=0))}
    assert here.facts("--device", "cuda", **gpu)["longest"] is None
    assert under(here.text("--device", "cuda", **gpu), "longest") == ["not known, as the memory of this machine is not"]
    assert here.error("--device", "cuda", "data.max_length=auto", **gpu) == (
        "data.max_length (command line): auto needs to know how much memory there is: give it with memory.device, or a length")


def test_auto_is_the_longest_that_fits(here):
    facts = here.facts(*H200, "--gpus", "4", "sequence_parallel_size=4", "data.max_length=auto", "data.div_length=1000")
    length = facts["sequence"]["max_length"]
    assert facts["fits"] and facts["sequence"]["auto"] and length % 4000 == 0 and length == facts["sequence"]["planned_length"] == facts["longest"]["max_length"]
    assert not here.facts(*H200, "--gpus", "4", "sequence_parallel_size=4", f"data.max_length={length * 102 // 100}", "data.div_length=1000")["fits"]
    assert f"max_length auto: {length:,}, the longest that fits" in here.text(*H200, "--gpus", "4", "sequence_parallel_size=4", "data.max_length=auto", "data.div_length=1000")


def test_auto_where_nothing_fits_is_a_plan_that_says_so(here):
    text = here.text("--gpu", "H100", "--gpu-memory", "4GiB", "--host-memory", "8GiB", "data.max_length=auto")
    assert "max_length auto: nothing fits" in text and "will not fit: " in text and under(text, "longest") == ["nothing fits"]


# Attention's results besides the program's buffers, and gaps between these, are what makes it too much here.
GAPS = ["--gpu", "A100", "--host-memory", "1TiB", "--disk", "1TiB", *(f"model.hf_config_kwargs.{key}={value}" for key, value in {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}.items())]


def test_auto_is_the_longest_also_where_buffers_have_gaps(here):
    length = here.facts(*GAPS, "data.max_length=auto", "model.init=random")["sequence"]["max_length"]
    assert here.facts(*GAPS, f"data.max_length={length}", "model.init=random")["fits"]
    assert not here.facts(*GAPS, f"data.max_length={length * 101 // 100}", "model.init=random")["fits"]


def test_what_fits_is_never_longer_than_the_longest(here):
    longest = here.facts(*GAPS, "model.init=random")["longest"]["max_length"]
    for length in range(longest, longest * 101 // 100, 1000):
        facts = here.facts(*GAPS, f"data.max_length={length}", "model.init=random")
        assert not facts["fits"] or facts["longest"]["max_length"] >= length


@pytest.mark.parametrize("tile, tokens", [("64", 1), ("64MiB", 1472), ("3GiB", 71488)])
def test_tiles_are_counted_to_the_last_rows(here, tile, tokens):
    facts = here.facts(*GAPS, "data.max_length=100000", "model.init=random", f"memory.tile={tile}")
    assert facts["tiles"]["mlp_tokens"] == tokens
    # There is room for all: nothing is computed twice. Linear weights in forward and twice in backward, 100,096 rows with padding.
    weights = 16 * (2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 5632) + 2048 * 32000
    assert facts["arithmetic"]["gemm_flops"] == pytest.approx(2 * 3 * 100_096 * weights, rel=1e-12)


def test_other_words_are_no_length(here):
    assert here.error("data.max_length=automatic") == "command line: data.max_length: expected an integer >= 1 and < 1099511627776 or auto, found 'automatic'"


def test_auto_does_not_change_what_is_prepared(tmp_path):
    fixtures.tiny(tmp_path)

    def prepared(*overrides):
        done = subprocess.run([str(ULYSSES), "prepare", "run.yml", "--json", *overrides], cwd=tmp_path, env=fixtures.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert prepared() == prepared("data.max_length=auto") == prepared("data.max_length=16")


# --- what would have to change


@pytest.mark.parametrize("machine, begins, way", [
    (["--gpu", "H200", "--gpu-memory", "40GiB", "data.max_length=2M"], "needs ", "sequence_parallel_size="),
    (["--gpu", "H200", "--host-memory", "60GiB", "data.max_length=600000"], "host memory: needs ", "keep them on a disk with memory.disk, "),
    ([*H200, "--disk", "60GiB", "data.max_length=1500000"], "disk: needs ", "memory.disk"),
])
def test_what_does_not_fit_says_which_tier_is_short_and_what_to_do(here, machine, begins, way):
    facts = here.facts(*machine)
    (sentence,) = [line.strip() for line in here.text(*machine).splitlines() if "will not fit: " in line]
    assert sentence.startswith("will not fit: " + begins) and way in sentence and not facts["fits"]
    needs, free = re.search(r"needs ([0-9.]+) (?:GiB|TiB) .*?, ([0-9.]+) GiB free", sentence).groups()
    assert float(needs) > float(free)
    assert here.facts(*machine, "data.max_length=" + re.search(r"data\.max_length=(\d+)", sentence)[1])["fits"]


# --- machines that one does not have


def test_an_imagined_machine_has_what_it_is_given(here):
    machine = here.facts("--gpus", "16", "--nodes", "2", "--gpu", "A100", "--gpu-memory", "40GiB", "--host-memory", "1TiB", "--host-cores", "48", "sequence_parallel_size=8")
    assert machine["mesh"] == {"device": "cuda", "world": 16, "sequence_parallel": 8, "replicas": 2}
    assert machine["machine"]["cores"] == 48 and machine["machine"]["gpus"] == 8 and machine["machine"]["memory_bytes"] == 2**40
    assert machine["machine"]["gpu"]["total_bytes"] == 40 * 2**30 and machine["machine"]["gpu"]["capability"] == [8, 0]
    assert "imagined" in here.text("--gpu", "B200")


def test_weights_may_be_copied_into_every_node(here):
    two_nodes = ["--gpus", "16", "--nodes", "2", "--gpu", "H100", "sequence_parallel_size=8"]
    plain, copied = here.facts(*two_nodes), here.facts(*two_nodes, "deepspeed.zero_optimization.zero_hpz_partition_size=8")
    assert (plain["exchanges"]["by"], plain["exchanges"]["node"], copied["exchanges"]["node"]) == ("nccl", 1, 8)
    eighth = copied["bytes"]["between_steps"] - plain["bytes"]["between_steps"]
    assert eighth == pytest.approx(8.03e9 * 2 / 8, rel=0.01) or plain["states"] != copied["states"]
    assert copied["time"]["seconds"] <= plain["time"]["seconds"] * 1.01
    assert "every 8 ranks share a second copy of the weights" in here.text(*two_nodes, "deepspeed.zero_optimization.zero_hpz_partition_size=8")
    error = here.error(*two_nodes, "deepspeed.zero_optimization.zero_hpz_partition_size=3")
    assert error.startswith("deepspeed.zero_optimization.zero_hpz_partition_size (command line): expected a divisor of 16 ranks, found 3")


def test_an_imagined_machine_knows_nothing_of_this_one(here):
    program = fixtures.program_with_gpu_part(ULYSSES, here.path)
    there = fixtures.fake_gpus(fixtures.gpu("Tesla V100-SXM2-16GB", (7, 0), 16, 15.5))
    assert here.facts(*H200, program=program, **there) == here.facts(*H200)
    assert here.text(*H200, program=program, **there) == here.text(*H200)


def test_a_gpu_that_is_not_known_is_taken_for_an_h100(here):
    assert not here.facts("--gpu", "Voodoo 2", "--gpu-memory", "80GiB")["time"]["rates_known"]
    assert "the rates of an H100 are assumed: nothing is known of Voodoo 2" in here.text("--gpu", "Voodoo 2")
    assert here.facts("--gpu", "H100")["time"]["rates_known"] and "are assumed" not in here.text("--gpu", "H100")


def test_an_imagined_cpu(here):
    facts = here.facts("--device", "cpu", "--host-memory", "500GiB", "--host-cores", "64")
    assert facts["mesh"]["device"] == "cpu" and facts["bytes"]["budget"] == 500 * 2**30 and facts["fits"]


@pytest.mark.parametrize("arguments, said", [
    (["--gpus", "0"], "--gpus: expected at least 1, found 0"),
    (["--gpus", "4", "--nodes", "3"], "--nodes: expected a divisor of 4 GPUs, found 3"),
    (["--gpus", "4", "sequence_parallel_size=3"], "sequence_parallel_size (command line): expected a divisor of 4 ranks, found 3"),
    (["--gpu-memory", "many"], "--gpu-memory: expected a size of at least 1MiB, such as 80GiB, found 'many'"),
    (["--host-memory", "64"], "--host-memory: expected a size of at least 1MiB, such as 80GiB, found '64'"),
    (["--host-memory", "0"], "--host-memory: expected a size of at least 1MiB, such as 80GiB, found '0'"),
    (["--gpu", "H100", "--disk", "-1GiB"], "--disk: expected a size of at least 1MiB, such as 80GiB, found '-1GiB'"),
    (["--gpu", "H100", "--device", "cpu"], "--device cpu: expected no --gpu"),
    (["--gpu", "H100", "--device", "tpu"], "--device: expected cpu or cuda, found 'tpu'"),
    (["--gpu", "H100", "model.dtype=fp32"], "model.dtype (command line): attention on a GPU computes in bf16: expected bf16, or --device cpu"),
    (["--nodes", "0"], "ulysses plan: --nodes: "),
    (["--host-cores", "-3"], "ulysses plan: --host-cores: "),
])
def test_a_machine_that_cannot_be_imagined(here, arguments, said):
    assert here.error(*arguments).startswith(said)


# --- disks


@pytest.mark.parametrize("overrides, said", [
    (["memory.disk=/nowhere/at/all"], "memory.disk (command line): expected folders that are there, found no /nowhere/at/all"),
    (["memory.disk=run.yml"], "memory.disk (command line): expected a folder, found the file run.yml"),
    (["memory.disk=.,/nowhere"], "memory.disk (command line): expected folders that are there, found no /nowhere"),
    (["memory.disk=','"], "command line: memory.disk: expected folders with commas between them, found ','"),
    (["memory.disk=7"], "command line: memory.disk: expected text, found 7"),
    (["memory.disk=.", "memory.disk_size=much"], "command line: memory.disk_size: expected a size such as 80GiB, found 'much'"),
    (["memory.host=-1"], "command line: memory.host: expected a size such as 80GiB, found -1"),
])
def test_a_disk_that_is_none_is_named(here, overrides, said):
    assert here.error("--device", "cpu", *overrides) == said


def test_the_place_in_the_file_is_told(here):
    (here.path / "run.yml").write_text(RECIPE + "memory:\n  host: 100GiB\n  disk: /nowhere\n")
    assert here.error("--device", "cpu") == "memory.disk (run.yml:8): expected folders that are there, found no /nowhere"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(here):
    (here.path / "closed").mkdir(mode=0o500)
    assert here.error("--device", "cpu", "memory.disk=closed") == "memory.disk (command line): closed cannot be written: Permission denied"


def test_a_disk_is_imagined_without_folders(here):
    facts = here.facts(*H200, "--disk", "60GiB", "data.max_length=1M")
    assert facts["fits"] and 0 < facts["disk_bytes"] <= 60 * 2**30
    assert facts["disk_bytes"] == here.facts(*H200, "memory.disk=/nowhere", "memory.disk_size=60GiB", "data.max_length=1M")["disk_bytes"]


def test_a_size_without_a_folder_has_no_effect_and_one_beyond_the_disk_is_told(here):
    assert "memory.disk_size (command line): no effect: memory.disk names no folder" in here.text(*H200, "memory.disk_size=1GiB")
    assert re.search(r"memory.disk_size \(command line\): 1.0 PiB, of which .* are free there", here.text("--device", "cpu", "memory.disk=.", "memory.disk_size=1024TiB"))


def test_what_is_asked_for_beyond_what_is_free_is_not_believed(here):
    imagined = ["--device", "cpu", "--host-memory", "24GiB", "--host-cores", "4"]
    text, facts = here.text(*imagined, "memory.gpu=40GiB", "memory.host=100GiB"), here.facts(*imagined, "memory.gpu=40GiB", "memory.host=100GiB")
    assert "memory.device (command line): 40.0 GiB, of which 24.0 GiB are free here" in text and "memory.host (command line): 100.0 GiB, of which 0 B are free here beside the device's" in text
    assert not facts["fits"] and facts["bytes"]["budget"] == 24 * 2**30
    assert re.search(r"will not fit: needs .* for the one rank, 24.0 GiB free, 22.8 GiB of it for a plan: ", text)
    assert "memory.device (command line): 200.0 GiB, of which 79.5 GiB are free here on each GPU" in here.text("--gpu", "H100", "memory.gpu=200GiB")


def test_on_the_cpu_program_and_libraries_are_priced(here):
    tiny = ["--device", "cpu", "--host-memory", "64GiB", "--host-cores", "4", "data.max_length=4096", "model.hf_config_kwargs.num_hidden_layers=1"]
    one, two = (here.facts(*tiny, "--gpus", str(n))["bytes"] for n in (1, 2))
    assert one["total"] == one["between_steps"] + one["within_step"] + one["libraries"]
    assert one["libraries"] - two["libraries"] == (66 // 2 + 2 * 8) * 2**20    # files are shared, and so are cores
    assert " for program and libraries" in here.text(*tiny)


def test_two_folders_on_one_disk_have_its_room_once(here):
    (here.path / "a").mkdir()
    (here.path / "b").mkdir()

    def room(folders):
        return re.search(r"of which (\S+ \S+) are free there", here.text("--device", "cpu", f"memory.disk={folders}", "memory.disk_size=1024TiB"))[1]

    assert room("a") == room("a,b")


def test_a_disk_in_memory_is_told(here):
    if subprocess.run(["stat", "-f", "-c", "%T", "/dev/shm"], capture_output=True, text=True).stdout.strip() != "tmpfs" or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    said = "memory.disk (command line): /dev/shm is a file system in memory and no disk: what lies there takes host memory besides the plan's"
    assert said in here.text("--device", "cpu", "memory.disk=/dev/shm") and said not in here.text("--device", "cpu", "memory.disk=.")


def test_lengths_beyond_reason_are_refused_at_once(here):
    assert here.error("data.max_length=9223372036854775807") == "command line: data.max_length: expected an integer >= 1 and < 1099511627776 or auto, found 9223372036854775807"
    assert here.error(*H200, "micro_batch_size=1e9", "data.max_length=1e6").startswith("micro_batch_size (command line): 1,000,000,000 samples of up to 1,000,000 tokens are more than ")
    assert not here.facts(*H200, "data.max_length=1e12")["fits"] and not here.facts("--device", "cpu", "data.max_length=1e12")["fits"]


def test_ranks_that_are_there_are_advised_before_more(here):
    eight = ["--gpu", "H100", "--gpus", "8", "data.max_length=4M"]
    advised = re.search(r"; sequence_parallel_size=(\d+), or", here.text(*eight))[1]
    assert here.facts(*eight, f"sequence_parallel_size={advised}")["fits"]
    more = re.search(r"; sequence_parallel_size=(\d+) on (\d+) ranks, or", here.text(*eight, "data.max_length=20M"))
    assert int(more[2]) > 8 and here.facts("--gpu", "H100", "--gpus", more[2], "--nodes", str(int(more[2]) // 8), "data.max_length=20M", f"sequence_parallel_size={more[1]}")["fits"]


# --- why


def test_explain_tells_what_else_was_considered(here):
    text, facts = here.text(*H200, "--explain"), here.facts(*H200, "--explain")
    assert facts["hash"] == here.facts(*H200)["hash"]    # nothing else is planned
    rows = under(text, "considered")
    assert rows[0].split() == ["device", "host", "disk", "seconds", "tokens/s"] and len(rows) == 1 + len(facts["considered"])
    assert sum(row.startswith("* ") for row in rows) == sum(row["chosen"] for row in facts["considered"]) == 1
    assert facts["considered"][0]["states"] == "states on the device" and "short" in rows[1]
    (chosen,) = [row for row in facts["considered"] if row["chosen"]]
    assert chosen["seconds"] <= 1.001 * min(row["seconds"] for row in facts["considered"] if row["fits"])
    why = "\n".join(under(text, "why"))
    assert why == "\n".join(facts["why"]) and "updates are made on the host: streamed through the device it takes " in why
    seconds = {f"{row['seconds']:.2f}" for row in facts["considered"]}
    assert set(re.findall(r"([0-9.]+) s a step instead", why)) <= seconds    # told, not invented
    assert "considered" not in here.facts(*H200) and under(here.text(*H200), "why") == []


# --- several at once


def test_compare_is_a_table_with_a_row_for_each_combination(here):
    arguments = [*H200, "--compare", "data.max_length=32k,128k,2M", "--compare", "sequence_parallel_size=1,2,64"]
    lines = here.text(*arguments).splitlines()
    assert lines[0].split()[:2] == ["data.max_length", "sequence_parallel_size"] and lines[0].endswith("kept")
    assert [line.split()[:2] for line in lines[1:]] == [[length, ranks] for length in ("32k", "128k", "2M") for ranks in ("1", "2", "64")]
    assert all("refused: sequence_parallel_size (command line): 64 ranks cannot share 32 query heads: expected at most 32" in line for line in lines[3::3])
    assert "does not fit" in lines[7] and "host memory: needs" in lines[7]
    rows = here.facts(*arguments)
    assert [row["set"] for row in rows] == [{"data.max_length": length, "sequence_parallel_size": ranks} for length in ("32k", "128k", "2M") for ranks in ("1", "2", "64")]
    one = here.facts(*H200, "data.max_length=128k")
    assert rows[3]["hash"] == one["hash"] and rows[3]["time"] == one["time"] and rows[3]["longest"] == one["longest"] and rows[3]["host_bytes"] == one["host_bytes"]
    assert f"{one['time']['seconds']:.2f}" in lines[4].split()
    assert rows[2]["refused"] and "fits" not in rows[2] and not rows[6]["fits"] and rows[6]["why_not"].startswith("host memory: needs")


def test_compare_takes_values_with_commas_in_brackets(here):
    rows = here.facts(*H200, "--compare", "optimizer.betas=[0.9, 0.95],[0.9, 0.999]")
    assert [row["set"] for row in rows] == [{"optimizer.betas": "[0.9, 0.95]"}, {"optimizer.betas": "[0.9, 0.999]"}] and all(row["fits"] for row in rows)


@pytest.mark.parametrize("arguments, said", [
    (["--compare", "data.max_length"], "--compare: expected KEY=V1,V2,..., found 'data.max_length'"),
    (["--compare", "data.max_length=1k,,2k"], "--compare: expected a value between the commas of 'data.max_length=1k,,2k'"),
    (["--compare", "epochs=1,2", "--explain"], "--compare: expected no --explain besides: it is for one plan"),
])
def test_a_comparison_of_nothing_is_refused(here, arguments, said):
    assert here.error(*H200, *arguments) == said


def test_what_is_refused_is_so_in_its_row_and_alone_altogether(here):
    one, other = here.facts(*H200, "--compare", "data.max_length=1k,never")
    assert not one["refused"] and other["refused"] == "command line: data.max_length: expected an integer >= 1 and < 1099511627776 or auto, found 'never'"
    assert here.error(*H200, "--compare", "data.max_lenght=1k,2k") == "command line: unknown key 'data.max_lenght'; did you mean 'data.max_length'?"


# --- when


def test_the_timeline_is_drawn_where_more_than_compute_is_busy(here):
    lines = under(here.text(*H200), "timeline")
    assert "|forward" in lines[0] and "|backward" in lines[0] and lines[0].endswith(" s")
    assert [line[:20].strip() for line in lines[1:]] == ["compute", "to the host", "to the device", "updates on the host"]
    assert set("".join(line[20:] for line in lines[1:])) <= set(" #+.")
    facts = here.facts(*H200)["time"]
    assert [part["name"] for part in facts["parts"]] == ["forward", "loss", "backward", "update"]
    assert facts["streams"]["to the host"]["busy"] > 0
    alone = here.facts("--gpu", "H200", "--gpu-memory", "1TiB")["time"]
    assert all(stream["busy"] == 0 for name, stream in alone["streams"].items() if name != "compute")
    assert under(here.text("--gpu", "H200", "--gpu-memory", "1TiB"), "timeline") == []
