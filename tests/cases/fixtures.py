"""What cases and tests set up: a tiny model with its tokenizer, chats, and the ways in which they can be broken.

Each function takes the folder of the case first; it may return a function that cleans up. None needs torch.
"""

import atexit
import functools
import json
import math
import os
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile

import numpy as np
import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0, "torch_dtype": "float32",
}
# Line numbers of errors refer to this text.
RECIPE = """\
sequence_parallel_size: 2
micro_batch_size: 1
model:
  name_or_path: model
  dtype: fp32
data:
  sources: [chats.jsonl]
  max_length: 128
  div_length: 16
  cache_dir: cache
optimizer: {learning_rate: 1.0e-3}
checkpoint:
  type: huggingface
  output_dir: out
  save_end_of_training: true
train_log_metrics_path: metrics.jsonl
kill_switch_path: stop
"""
NUM_CHATS = 6
# ULYSSES_TEST_DEVICE=cuda runs on GPUs what takes ON_DEVICE: stops, kills, states to go on from; two ranks, each on a GPU of its own, or with
# ULYSSES_SHARE_GPU=1 on one. Not for tests that go on with other ranks: there the order of sums differs.
DEVICE = os.environ.get("ULYSSES_TEST_DEVICE", "cpu")
ON_DEVICE = ["--device", DEVICE, *(["--num_gpus", "2", "model.dtype=bf16", "deterministic=true"] if DEVICE == "cuda" else [])]


def environment(**more):
    """The environment of a run that must not depend on this machine: no network, no tokens, no GPUs, one thread a rank.

    `more` is added; None removes.
    """
    names = ("CUDA_DEVICE_ORDER", "ULYSSES_SHARE_GPU", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("HF_", "HUGGINGFACE", "TORCHELASTIC"))}
    if DEVICE == "cuda":
        more = {**{k: os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "ULYSSES_SHARE_GPU")}, **more}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ULYSSES_RATES": "no-rates.json", "HF_HOME": str(shared() / "hub")}
    return {k: v for k, v in {**kept, **fixed, **more}.items() if v is not None}


def gpu(name="NVIDIA H200", capability=(9, 0), gib=139.8, free=139.3, processes=()):
    """One GPU as fake_nvml.cc reads it; processes are pairs of pid and GiB (None: not told)."""
    held = [part for pid, size in processes for part in (pid, -1 if size is None else int(size * 2**30))]
    return ";".join(str(part) for part in (name, *capability, int(gib * 2**30), int(free * 2**30), *held))


def fake_gpus(*gpus, driver="580.65.06;13000", visible=None, **more):
    """What to add to an environment for a machine with these GPUs, whatever this one has."""
    places = [str(fake_nvml()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"FAKE_NVML": "|".join(gpus), "FAKE_NVML_DRIVER": driver, "LD_LIBRARY_PATH": ":".join(places), "CUDA_VISIBLE_DEVICES": visible, **more}


@functools.cache
def fake_nvml():
    """The folder with a driver's library that knows the GPUs which FAKE_NVML names."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler for the driver's library that these tests play")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ulysses-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = pathlib.Path(__file__).resolve().parent / "fake_nvml.cc"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


def program_with_gpu_part(ulysses, folder):
    """A copy of the program that finds a GPU part beside itself, though an empty one."""
    (folder / "bin").mkdir()
    (folder / "bin" / "libulysses_cuda.so").touch()
    return shutil.copy(ulysses, folder / "bin" / "ulysses")


@functools.cache
def shared():
    """A folder for all tests of this process: the model, and the cache of prepared data."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ulysses-cases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "cache").mkdir()
    make_model(folder / "model")
    return folder


def make_model(folder):
    """Writes a model in the Hugging Face layout: config.json, model.safetensors, tokenizer, chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    write_weights(folder / "model.safetensors", weights())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["what is the code word? user assistant falcon heron"] * 30, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "chat_template.jinja").write_text(CHATML)


def weights():
    """Random weights by name, as Llama has them."""
    random = np.random.default_rng(0)
    D, F, V, N, K = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads"))
    H = D // N

    def matrix(rows, columns):
        return random.normal(0, 0.02, (rows, columns)).astype(np.float32)

    ones = np.ones(D, np.float32)
    found = {"model.embed_tokens.weight": matrix(V, D)}
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}."
        found |= {
            at + "input_layernorm.weight": ones, at + "post_attention_layernorm.weight": ones,
            at + "self_attn.q_proj.weight": matrix(N * H, D), at + "self_attn.k_proj.weight": matrix(K * H, D),
            at + "self_attn.v_proj.weight": matrix(K * H, D), at + "self_attn.o_proj.weight": matrix(D, N * H),
            at + "mlp.gate_proj.weight": matrix(F, D), at + "mlp.up_proj.weight": matrix(F, D), at + "mlp.down_proj.weight": matrix(D, F),
        }
    return found | {"model.norm.weight": ones, "lm_head.weight": matrix(V, D)}


def write_weights(path, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, str(path), metadata={"format": "pt"})


def read_weights(folder):
    """All tensors of a saved model, by name."""
    from safetensors.numpy import load_file

    return {name: tensor for path in sorted(pathlib.Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def conversation(i, words=3):
    answer = ("falcon", "heron")[i % 2]
    return [
        {"role": "user", "content": f"{i} {'the code word is ' * words}{answer}, what is the code word?"},
        {"role": "assistant", "content": answer},
    ]


def processes_in(folder, program):
    """/proc entries of processes whose program's path has `program` in it and that run in `folder`."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(place / "cwd") == str(folder) and program in os.readlink(place / "exe"):
                found.append(place)
        except OSError:
            continue
    return found


def ranks_in(folder):
    """{rank: pid} of the engines that run in `folder`."""
    found = {}
    for place in processes_in(folder, "ulysses-engine"):
        try:
            rank = re.search(rb"\0RANK=(\d+)\0", b"\0" + (place / "environ").read_bytes())
        except OSError:
            continue
        if rank:  # none in the moment in which it is about to become an engine
            found[int(rank[1])] = int(place.name)
    return found


# ---- what `---- setup` lines call ----


def tiny(folder, num_chats=NUM_CHATS):
    """A recipe (run.yml, unless the case brings one), a model, chats; prepared data are shared by all cases."""
    shutil.copytree(shared() / "model", folder / "model")
    (folder / "cache").symlink_to(shared() / "cache")
    chats(folder, num_chats)
    if not (folder / "run.yml").exists():
        (folder / "run.yml").write_text(RECIPE)


def chats(folder, count):
    rows(folder, *({"messages": conversation(i)} for i in range(int(count))))


def rows(folder, *items):
    (folder / "chats.jsonl").write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))


def nested_rows(folder):
    rows(folder, "[" * 100_000)


def config(folder, *changes):
    """Changes keys of config.json: KEY=JSON, or KEY= to remove one."""
    path = folder / "model" / "config.json"
    value = json.loads(path.read_text())
    for change in changes:
        key, _, text = change.partition("=")
        value[key] = json.loads(text) if text else None
        if not text:
            del value[key]
    path.write_text(json.dumps(value))


def no_config(folder):
    (folder / "model" / "config.json").unlink()


def pickled_weights(folder):
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def truncated_weights(folder):
    path = folder / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def corrupt_header(folder):
    path = folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] = ord("x")
    path.write_bytes(bytes(data))


def header_that_lies(folder):
    """A header that claims to be longer than the file."""
    path = folder / "model" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def empty_weights(folder):
    (folder / "model" / "model.safetensors").write_bytes(b"")


def without_tensor(folder, name):
    tensors = weights()
    del tensors[name]
    write_weights(folder / "model" / "model.safetensors", tensors)


def tensor_of_shape(folder, name, *shape):
    write_weights(folder / "model" / "model.safetensors", {**weights(), name: np.zeros([int(n) for n in shape], np.float32)})


def tensor_of_integers(folder, name):
    write_weights(folder / "model" / "model.safetensors", {**weights(), name: np.zeros(weights()[name].shape, np.int32)})


def tensor_with_nan(folder, name):
    tensors = weights()
    tensors[name].flat[0] = math.nan
    write_weights(folder / "model" / "model.safetensors", tensors)


def index_without_file(folder):
    """model.safetensors.index.json that names a file which was never downloaded."""
    (folder / "model" / "model.safetensors").rename(folder / "model" / "model-00001-of-00002.safetensors")
    names = list(weights())
    files = {name: f"model-0000{1 if i + 1 < len(names) else 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def same_vocabulary(folder, size):
    """Weights of a model that knows so many tokens; its tokenizer knows more."""
    rows_kept = {k: v[: int(size)] if k in ("model.embed_tokens.weight", "lm_head.weight") else v for k, v in weights().items()}
    write_weights(folder / "model" / "model.safetensors", rows_kept)


def no_tokenizer(folder):
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()


def no_template(folder):
    (folder / "model" / "chat_template.jinja").unlink()


def not_utf8(folder, name):
    (folder / name).write_bytes(b"model: {name_or_path: m\xff}\n")


def cached_model(folder, name):
    """The model in the hub's cache, as a download would have left it; there is no network."""
    place = shared() / "hub" / "hub" / ("models--" + name.replace("/", "--"))
    if not place.exists():
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
        shutil.copytree(shared() / "model", place / "snapshots" / "0123456789abcdef0123456789abcdef01234567")


def small_disk(folder, name, size):
    """A file system of `size` at folder/name; skips where this user may not mount one."""
    place = folder / name
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    return lambda: subprocess.run(["umount", str(place)], check=True)


def full_disk(folder, name):
    """A small disk without any room left."""
    clean_up = small_disk(folder, name, "64k")
    try:
        with open(folder / name / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
    return clean_up


def no_gpu_here(_):
    if any(pathlib.Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")


def something_there(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "thesis.txt").write_text("do not touch")


def is_there(folder, name):
    assert (folder / name).exists(), name


def is_absent(folder, name):
    assert not (folder / name).exists(), name


def lines(folder, name, count):
    """A file of so many lines."""
    found = (folder / name).read_text().splitlines() if (folder / name).exists() else []
    assert len(found) == int(count), found
