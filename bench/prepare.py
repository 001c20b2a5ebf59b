"""bench/prepare.py [--chats 200000] [--json bench/results/prepare.jsonl]

How fast is `ulysses prepare` against the tokenizer library alone, and what memory does it take? Chats of the shape of
ultrachat_200k are generated (some six turns, some 6,000 characters); the tokenizer, a byte-level BPE of 32,000, is trained on some.

The rate of one core: the same texts, rendered before, by `encode_batch` without threads. It is taken before and after, and the
preparation is held against the better one. On a machine that does other things as well, tokens per second of CPU time say more than
tokens per second: both are given. Memory: the largest resident set of the preparing process and of any of its processes, for a tenth
of the chats and for all.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SAMPLE = 1000    # chats that the library alone is timed on


def words(count, random_):
    """Made-up words of one to four syllables, as often as words are (Zipf)."""
    syllables = [c + v + e for c in ["", *"bcdfghklmnprstvw", "st", "th", "ch", "pr"] for v in "aeiou" for e in ["", "n", "r", "s", "t", "l", "ng"]]
    out = sorted({"".join(random_.choice(syllables) for _ in range(random_.choice([1, 1, 2, 2, 3, 4]))) for _ in range(count)})
    random_.shuffle(out)
    return out, [1 / (i + 2) for i in range(len(out))]


def sentence(vocabulary, weights, random_):
    some = random_.choices(vocabulary, cum_weights=weights, k=random_.randint(6, 22))
    if random_.random() < 0.2:
        some[-1] += f" {random_.randint(0, 3000)}"
    return some[0].capitalize() + " " + " ".join(some[1:-1]) + random_.choice([" ", ", ", " “", " – "]) + some[-1] + random_.choice([". ", ". ", "? ", "!\n\n", ".\n- "])


def write_chats(path, count, seed=1):
    from itertools import accumulate

    random_ = random.Random(seed)
    vocabulary, weights = words(30000, random_)
    weights = list(accumulate(weights))
    stock = [sentence(vocabulary, weights, random_) for _ in range(20000)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for _ in range(random_.choice([2, 3, 3, 4])):
                for role, most in (("user", 4), ("assistant", 26)):
                    messages.append({"role": role, "content": "".join(random_.choices(stock, k=random_.randint(1, most))).strip()})
            file.write(json.dumps({"prompt": messages[0]["content"], "messages": messages}, ensure_ascii=False) + "\n")


def make_tokenizer(folder, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=32000, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def library_alone(folder, path):
    """Runs in a process of its own. Returns (tokens a second, tokens a second of CPU time) of the library on one core."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(path, encoding="utf-8") as file:
        texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line, _ in zip(file, range(SAMPLE))]
    backend = tokenizer.backend_tokenizer
    backend.encode_batch(texts[:50], add_special_tokens=False)
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for i in range(0, len(texts), 100):
        tokens += sum(map(len, backend.encode_batch(texts[i : i + 100], add_special_tokens=False)))
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


def prepare(request, scratch):
    """Returns (answer, seconds, CPU seconds, largest resident sets in MiB: of the process, of one of its own)."""
    (scratch / "request.json").write_text(json.dumps(request))
    code = (
        "import json, os, resource, runpy, sys, ulysses_plus.errors as e\n"
        "end = os._exit\n"
        "def told(code):\n"
        "    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        f"    json.dump([own.ru_maxrss / 1024, others.ru_maxrss / 1024], open({str(scratch / 'memory.json')!r}, 'w'))\n"
        "    end(code)\n"
        "os._exit = told\n"
        f"sys.argv = ['prepare', '--request', {str(scratch / 'request.json')!r}]\n"
        "runpy.run_module('ulysses_plus.prepare', run_name='__main__')\n"
    )
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"})
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.returncode)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout), seconds, cpu, json.loads((scratch / "memory.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--chats", type=int, default=200000)
    parser.add_argument("--json", help="append the rows to this file")
    parser.add_argument("--library", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        print(json.dumps(library_alone(*arguments.library)))
        return
    cores = os.cpu_count()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = pathlib.Path(scratch_name)
        write_chats(scratch / "all.jsonl", arguments.chats)
        with open(scratch / "all.jsonl", encoding="utf-8") as file, open(scratch / "tenth.jsonl", "w", encoding="utf-8") as tenth:
            tenth.writelines(line for line, _ in zip(file, range(arguments.chats // 10)))
        with open(scratch / "all.jsonl", encoding="utf-8") as file:
            make_tokenizer(scratch / "tokenizer", [m["content"] for line, _ in zip(file, range(1000)) for m in json.loads(line)["messages"]])

        def alone():
            command = [sys.executable, __file__, "--library", str(scratch / "tokenizer"), str(scratch / "all.jsonl")]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}).stdout)

        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
        rows, rates = [], [alone()]
        for name, count in (("tenth", arguments.chats // 10), ("all", arguments.chats)):
            data = {"sources": [str(scratch / f"{name}.jsonl")], "cache_dir": str(scratch / "cache"), "num_proc": cores}
            answer, seconds, cpu, (own, largest) = prepare({"type": "sft", "tokenizer": str(scratch / "tokenizer"), "vocab_size": 32000, "data": data}, scratch)
            rates.append(alone())
            tokens, (rate, cpu_rate) = answer["num_tokens"], (max(column) for column in zip(*rates))
            rows.append({
                "run": stamp, "system": "ulysses", "chats": count, "tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds), "cores": cores,
                "library_tokens_per_second_of_a_core": round(rate), "of_all_cores": round(tokens / seconds / (cores * rate), 3),
                "cpu_seconds": round(cpu, 1), "of_the_library_by_cpu_time": round(tokens / cpu / cpu_rate, 3), "peak_mib": round(own), "peak_mib_of_a_process": round(largest),
                "load_average": round(os.getloadavg()[0], 1), "command": f"bench/prepare.py --chats {arguments.chats}", "machine": f"{cores} cores, {platform.machine()}",
                "date": datetime.date.today().isoformat(),
            })
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
