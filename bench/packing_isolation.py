"""bench/packing_isolation.py [--json bench/results/packing.jsonl]

Five documents share one sequence; a token of one is changed: by how much do the logits, the loss and the gradient at the embedding's outputs
of the others change? For Transformers' SDPA path with packed positions, as one process has it (without a cache: with one, the default, they are not looked at); for the same with the mask left out, as
sequence parallelism over that path does (positions then cannot keep documents apart); and for this program on 1, 2 and 4 ranks.

CPU, fp32, a tiny Llama with 6 query and 2 key-value heads, which four ranks share unevenly.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import socket
import subprocess
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
LENGTHS = [9, 14, 5, 20, 16]
VOCABULARY, CHANGED = 90, 1  # of the document that is changed
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
}


def spans():
    starts = np.cumsum([0, *LENGTHS])
    return list(zip(starts[:-1], starts[1:]))


def ids(changed):
    """Every token has an id of its own, so that a row of the embedding's gradient is the gradient at one output."""
    out = np.arange(1, sum(LENGTHS) + 1)
    if changed:
        out[spans()[CHANGED][0] + 2] = VOCABULARY - 1
    return out


def transformers_differences(model, mask, cache=False):
    """The largest change of logits, of the loss and of gradients at the embedding's outputs, over the other documents."""
    import torch
    from transformers.models.llama import modeling_llama

    built = modeling_llama.create_causal_mask
    if not mask:
        modeling_llama.create_causal_mask = lambda *args, **kwargs: None
    try:
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        results = []
        for changed in (False, True):
            tokens = torch.from_numpy(ids(changed))[None]
            found = []
            for document, (begin, end) in enumerate(spans()):
                embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
                logits = model(inputs_embeds=embedded, position_ids=positions, use_cache=cache).logits[0]
                loss = torch.nn.functional.cross_entropy(logits[begin:end - 1], tokens[0, begin + 1:end])
                loss.backward()
                if document != CHANGED:
                    found.append((logits[begin:end].detach(), loss.detach(), embedded.grad[0, begin:end]))
            results.append(found)
    finally:
        modeling_llama.create_causal_mask = built
    return [max((a[i] - b[i]).abs().max().item() for a, b in zip(*results)) for i in range(3)]


def write_tokens(path, changed, document):
    from safetensors.numpy import save_file

    begin, end = spans()[document]
    trained = np.zeros(sum(LENGTHS), np.uint8)
    trained[begin + 1:end] = 1
    tensors = {"ids": ids(changed).astype(np.int32), "trained": trained, "starts": np.cumsum([0, *LENGTHS]).astype(np.int64)}
    save_file(tensors, str(path), metadata={"format": "ulysses-tokens-1", "vocabulary": str(VOCABULARY)})


def train(engine, folder, ranks, changed, document):
    """Returns the loss and all gradients of one step in which only `document` is trained."""
    from safetensors import safe_open

    write_tokens(folder / "tokens.safetensors", changed, document)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [engine, "train", folder / "run.yml", "--model", folder / "model", "--tokens", folder / "tokens.safetensors", "--dump", folder / "dump"]
    running = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        running.append(subprocess.Popen([str(c) for c in command] + [f"sequence_parallel_size={ranks}"], env=os.environ | {k: str(v) for k, v in place.items()}, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, text = process.communicate()
        assert process.returncode == 0, text
    with safe_open(str(folder / "dump" / "step_1.safetensors"), "np") as file:
        return float(file.metadata()["loss"]), {name: file.get_tensor(name) for name in file.keys()}


def our_differences(engine, folder, ranks):
    """lm_head's gradient is that of the logits times what they were made from; the embedding's has a row for each token."""
    most = [0.0, 0.0, 0.0]
    for document in range(len(LENGTHS)):
        if document == CHANGED:
            continue
        (loss, a), (other, b) = (train(engine, folder, ranks, changed, document) for changed in (False, True))
        differences = [np.abs(a["lm_head.weight"] - b["lm_head.weight"]).max(), abs(loss - other), max(np.abs(a[name] - b[name]).max() for name in a)]
        most = [max(x, float(y)) for x, y in zip(most, differences)]
    return most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--build", default=ROOT / "build", type=pathlib.Path)
    arguments = parser.parse_args()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"), attn_implementation="sdpa").float().train()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(folder / "model")
        (folder / "run.yml").write_text(
            f"model: {{name_or_path: {folder}/model, dtype: fp32}}\ndata: {{sources: [none.jsonl], max_length: 128, div_length: 16, pack_samples: true}}\n"
            "exit_iteration: 1\ntrain_log_iter_interval: 0\nkill_switch_path: /nonexistent/stop\n"
        )
        cases = {f"transformers {__version__} sdpa, one process": lambda: transformers_differences(model, True),
                 f"transformers {__version__} sdpa, one process, with its default cache": lambda: transformers_differences(model, True, True),
                 f"transformers {__version__} sdpa, mask left out as over several ranks": lambda: transformers_differences(model, False)}
        for ranks in (1, 2, 4):
            cases[f"ulysses-plus, {ranks} rank{'s' * (ranks > 1)}"] = lambda ranks=ranks: our_differences(arguments.build / "ulysses-engine", folder, ranks)
        for system, measure in cases.items():
            began = time.monotonic()
            logits, loss, gradient = measure()
            row = {"run": "isolation", "system": system, "what": "one token of a document changed: the others' largest difference", "logits": logits, "loss": loss, "gradient": gradient,
                   "seconds": round(time.monotonic() - began, 2), "command": "bench/packing_isolation.py", "machine": f"{os.cpu_count()} cores, {platform.machine()}", "date": datetime.date.today().isoformat()}
            print(f"{system:<70} logits {logits:.3g}  loss {loss:.3g}  gradient {gradient:.3g}", flush=True)
            if arguments.json:
                with open(arguments.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
