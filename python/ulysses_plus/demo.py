"""python -m ulysses_plus.demo --build BUILD [--out demo-out]

Shows on two CPU processes that training across ranks works. Makes a small Llama checkpoint and chats whose answer depends
on a fact far away (see demo_task.py), trains it with BUILD/ulysses, and measures recall on chats with unseen facts:

    before training                    about 0 %
    trained, each chat on two ranks    at least 90 %
    control, attention inside a rank   about 1/16, a guess among the code words

Exit 0 when all three hold, 1 when one does not, 2 when something is missing; a failed training's own exit code else.
"""

import argparse
import glob
import math
import os
import shutil
import subprocess
import sys
import time

from ulysses_plus import demo_task
from ulysses_plus.errors import UserError, run

SEED = 1
NUM_TRAIN, NUM_TEST = 960, 96
# A test chat's passage is at least this long, in characters: fact and answer are then some 250 to 600 tokens apart.
SHORTEST_TEST = 600
RECIPE = os.path.join(os.path.dirname(__file__), "..", "..", "recipes", "demo-recall.yml")


class TrainingFailed(Exception):
    pass


def make_inputs(out):
    """Writes OUT/base (model and tokenizer), OUT/chats.jsonl, OUT/test.jsonl and OUT/recall.yml; returns the test chats."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name in ("base", "trained", "control"):
        shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    os.makedirs(out, exist_ok=True)
    text = demo_task.real_text()
    tokenizer = demo_task.make_tokenizer(text)
    model = demo_task.make_model(SEED)
    model.save_pretrained(os.path.join(out, "base"))
    tokenizer.save_pretrained(os.path.join(out, "base"))
    train = demo_task.make_chats(text, NUM_TRAIN, held_out=False, seed=SEED)
    test = demo_task.make_chats(text, NUM_TEST, held_out=True, seed=SEED + 1, shortest=SHORTEST_TEST)
    demo_task.write_chats(os.path.join(out, "chats.jsonl"), train)
    demo_task.write_chats(os.path.join(out, "test.jsonl"), test)
    with open(RECIPE, encoding="utf-8") as file:
        recipe = file.read()
    with open(os.path.join(out, "recall.yml"), "w", encoding="utf-8") as file:
        file.write(recipe.replace("demo-out/", out.rstrip("/") + "/"))
    lengths = [_check_halves(tokenizer, chat) for chat in train + test]
    print(
        f"{NUM_TRAIN} chats of {min(lengths):,} to {max(lengths):,} tokens, {NUM_TEST} to test with unseen pairs of name and word; "
        f"a Llama of {sum(p.numel() for p in model.parameters()):,} random weights"
    )
    return test


def _check_halves(tokenizer, chat):
    """Returns the chat's tokens, after asserting that fact and answer are on different ranks, padding included."""
    text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (word,) = tokenizer(chat["messages"][1]["content"], add_special_tokens=False)["input_ids"]
    places = [i for i, id_ in enumerate(ids) if id_ == word]
    half = math.ceil(len(ids) / 32) * 16
    assert len(places) == 2 and places[0] < half <= places[1] - 1, (places, half)
    return len(ids)


def train(build, out, *overrides):
    """Trains OUT/recall.yml on two CPU processes, its progress passed through. Raises TrainingFailed with the exit code."""
    command = [os.path.join(build, "ulysses"), os.path.join(out, "recall.yml"), "--device", "cpu", *overrides]
    print("\n$ " + " ".join(command), flush=True)
    began = time.monotonic()
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": _python_path()}).returncode
    if code != 0:
        raise TrainingFailed(code if code > 0 else 128 - code)
    print(f"trained in {time.monotonic() - began:.0f} s", flush=True)


def _python_path():
    ours = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
    return os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))


def checkpoint_in(folder):
    """Returns the newest checkpoint below `folder`: the folder itself or its latest global_step_N."""
    found = glob.glob(os.path.join(folder, "**", "config.json"), recursive=True)
    if not found:
        raise UserError(f"{folder}: expected a checkpoint after the training, found none")
    return os.path.dirname(max(found, key=os.path.getmtime))


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m ulysses_plus.demo", description="Trains a small model on two CPU processes and tests its recall.")
    parser.add_argument("--build", required=True, help="folder that holds the program `ulysses`")
    parser.add_argument("--out", default="demo-out", help="folder for model, chats and checkpoints (default: demo-out)")
    arguments = parser.parse_args(argv)
    if not os.access(os.path.join(arguments.build, "ulysses"), os.X_OK):
        raise UserError(f"{arguments.build}: expected the program ulysses in it, found none: run make build")
    began, out = time.monotonic(), arguments.out
    test = make_inputs(out)
    base = os.path.join(out, "base")
    _show(test[0])
    before, _ = demo_task.recall(base, base, test)
    print(f"recall before training: {before:.1%}", flush=True)
    try:
        train(arguments.build, out)
        after, answers = demo_task.recall(checkpoint_in(os.path.join(out, "trained")), base, test)
        print(f"recall after training: {after:.1%}; to the chat above it answers: {answers[0]}", flush=True)
        train(
            arguments.build, out, "attention_scope=shard", f"checkpoint.output_dir={out}/control",
            f"train_log_metrics_path={out}/metrics-control.jsonl",
        )
    except TrainingFailed as error:
        print(f"the training ended with exit code {error}; its own message stands above", file=sys.stderr)
        return error.args[0]
    control, _ = demo_task.recall(checkpoint_in(os.path.join(out, "control")), base, test)
    return _conclude(before, after, control, time.monotonic() - began)


def _show(chat):
    question, answer = (message["content"] for message in chat["messages"])
    print(f"such as: {question[:90]!r} ... {question[-60:]!r} -> {answer!r}")


def _conclude(before, after, control, seconds):
    """Prints the table and says whether the claims hold; returns the exit code."""
    chance = demo_task.CHANCE
    # A guess is right with probability `chance`; four standard deviations above it are no longer a guess.
    guess = chance + 4 * math.sqrt(chance * (1 - chance) / NUM_TEST)
    rows = [
        ("before training", before, "below 5 %", before < 0.05),
        ("trained, each chat on two ranks", after, "at least 90 %", after >= 0.9),
        ("control: attention inside each rank", control, f"a guess, 1/{len(demo_task.WORDS)}: below {guess:.0%}", control < guess),
    ]
    print(f"\n{'recall of a fact on the other rank':38}{'':>9}  expected")
    for name, value, expected, holds in rows:
        print(f"{name:38}{value:>9.1%}  {expected}{'' if holds else '  <- DOES NOT HOLD'}")
    print(f"{NUM_TEST} chats with unseen facts; {seconds:.0f} s in all")
    return 0 if all(holds for *_, holds in rows) else 1


if __name__ == "__main__":
    run(main)
