"""From chats to a checkpoint that Transformers loads: what one command does, on two processes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

import fixtures  # noqa: E402

ULYSSES = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")).resolve() / "ulysses"
MAPPED = """\
sequence_parallel_size: 2
gradient_accumulation_steps: 4
epochs: 2
model: {name_or_path: model, dtype: fp32}
data:
  sources:
    - name_or_path: chats.jsonl
      type: huggingface_instruct
      role_mapping: {user: talk.who.customer, assistant: talk.who.clerk}
      content_key: said
  max_length: 128
  div_length: 16
  cache_dir: cache
optimizer: {learning_rate: 1.0e-2}
checkpoint: {type: huggingface, output_dir: out, save_end_of_training: true}
train_log_metrics_path: metrics.jsonl
kill_switch_path: stop
"""
NUM_CHATS = 6       # windows of 4 and 2 micro-batches: the last one of an epoch is partial
NUM_STEPS = 4


def run(folder, *command, code=0):
    done = subprocess.run([str(part) for part in command], cwd=folder, env=fixtures.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the recipe has been run once, and what was said."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.yml").write_text(MAPPED)
    fixtures.tiny(folder)
    who = {"user": "customer", "assistant": "clerk"}
    fixtures.rows(folder, *({"talk": [{"who": who[t["role"]], "said": t["content"]} for t in fixtures.conversation(i)]} for i in range(NUM_CHATS)))
    return folder, run(folder, ULYSSES, "run.yml", "--device", "cpu").stderr


def test_the_plans_number_of_steps_is_the_number_of_metric_lines(trained):
    folder, said = trained
    assert re.search(rf"^steps +{NUM_STEPS} \(2 an epoch", said, re.MULTILINE), said
    lines = metrics(folder)
    assert [line["iter"] for line in lines[:NUM_STEPS]] == [1, 2, 3, 4] and len(lines) % NUM_STEPS == 0
    assert lines[0]["tokens"] > lines[1]["tokens"] > 0      # 4 chats, then the 2 that are left
    assert lines[1]["epoch"] == 1 and lines[3]["epoch"] == 2
    assert lines[3]["loss"] < lines[0]["loss"]


def test_progress_is_a_line_a_step_with_loss_speed_and_time_left(trained):
    lines = [line for line in trained[1].splitlines() if line.startswith("Train iter: ")]
    assert len(lines) == NUM_STEPS
    assert all(all(word in line for word in ("loss: ", "tokens/s: ", "ETA: ")) for line in lines)


def test_the_plan_is_said_once(trained):
    assert sum(line.startswith("mesh ") for line in trained[1].splitlines()) == 1


def test_transformers_loads_the_checkpoint_without_a_warning(trained):
    script = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'what?'}], tokenize=False, add_generation_prompt=True)\n"
        "ids = tokenizer(text, return_tensors='pt', add_special_tokens=False)\n"
        "print(model.dtype, torch.isfinite(model(**ids).logits).all().item(), text.count('<|im_start|>'))\n"
    )
    done = run(trained[0], sys.executable, "-c", script, "out/global_step_4")
    assert done.stdout == "torch.float32 True 2\n"
    assert "Error" not in done.stderr and "arning" not in done.stderr and "newly initialized" not in done.stderr, done.stderr


def test_the_saved_folder_is_whole_and_its_weights_have_moved(trained):
    folder = trained[0]
    saved = folder / "out" / "global_step_4"
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["global_step_4"]
    before, after = fixtures.weights(), fixtures.read_weights(saved)
    assert before.keys() == after.keys()
    assert all(after[name].shape == before[name].shape and not np.array_equal(after[name], before[name]) for name in before)


def test_a_second_run_prepares_nothing_and_gives_the_same_numbers(trained):
    folder, _ = trained
    first, weights = metrics(folder)[:NUM_STEPS], fixtures.read_weights(folder / "out" / "global_step_4")
    said = run(folder, ULYSSES, "run.yml", "--device", "cpu").stderr
    assert "tokenised" not in said and "saved out/global_step_4" in said
    second = metrics(folder)[-NUM_STEPS:]
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    again = fixtures.read_weights(folder / "out" / "global_step_4")
    assert all(np.array_equal(weights[name], again[name]) for name in weights)


def test_training_goes_on_from_its_own_checkpoint(trained):
    folder, _ = trained
    done = run(folder, ULYSSES, "run.yml", "--device", "cpu", "model.name_or_path=out/global_step_4", "checkpoint.output_dir=more", "train_log_metrics_path=more.jsonl", "exit_iteration=1")
    first = json.loads((folder / "more.jsonl").read_text().splitlines()[0])
    assert first["loss"] < metrics(folder)[0]["loss"] and "saved more/global_step_1" in done.stderr


def test_ranks_started_by_torchrun_give_the_same_losses(trained):
    folder, _ = trained
    torchrun = pathlib.Path(sys.executable).with_name("torchrun")
    done = run(folder, torchrun, "--no-python", "--nproc_per_node", "2", ULYSSES, "run.yml", "--device", "cpu", "train_log_metrics_path=torchrun.jsonl", "checkpoint.output_dir=torchrun")
    assert done.stderr.count("Train iter: ") == NUM_STEPS and done.stderr.count("saved torchrun/global_step_4") == 1
    lines = [json.loads(line) for line in (folder / "torchrun.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(folder)[:NUM_STEPS]]


def test_profile_writes_a_trace_of_the_third_step(trained):
    folder, _ = trained
    said = run(folder, ULYSSES, "run.yml", "--device", "cpu", "--profile", "trace.json", "checkpoint=[]", "train_log_metrics_path=other.jsonl").stderr
    assert "trace of step 3: trace.json" in said
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any(e.get("name") == "step 3" for e in events)
