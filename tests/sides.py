"""Both sides of a test of parity: tiny models, the engine's training of them, and Transformers' with autograd.

Shared by tests/golden (CPU, fp32) and tests/gpu (bf16).
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, get_scheduler
from transformers.utils import logging

logging.disable_progress_bar()

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENGINE = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")) / "ulysses-engine"
TOKENS_AT_ONCE = 100_000  # that Transformers computes in one batch

BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.08, pad_token_id=None, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
CASES = {
    "llama": (LlamaConfig, {}),
    "llama_tied": (LlamaConfig, dict(tie_word_embeddings=True)),
    "llama_mqa": (LlamaConfig, dict(num_key_value_heads=1)),
    "llama_mha": (LlamaConfig, dict(num_key_value_heads=6)),
    "llama_head_dim_24": (LlamaConfig, dict(head_dim=24)),
    "llama_biases": (LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "llama_padding_token": (LlamaConfig, dict(pad_token_id=7)),
    "llama_linear": (LlamaConfig, dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "llama_llama3": (LlamaConfig, dict(rope_parameters=LLAMA3)),
    "llama_yarn": (LlamaConfig, dict(rope_parameters=YARN)),
    "llama_dynamic": (LlamaConfig, dict(max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))),
    "qwen2": (Qwen2Config, {}),
    "qwen2_tied": (Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, dict(head_dim=16)),
    "qwen3_tied_bias": (Qwen3Config, dict(head_dim=24, tie_word_embeddings=True, attention_bias=True)),
    "mistral": (MistralConfig, dict(sliding_window=None, head_dim=None)),
}


def make_config(name, **more):
    config_class, extra = CASES[name]
    return config_class(**{**BASE, **extra, **more})


def make_model(folder, config, dtype=torch.float32):
    """Saves a tiny model whose norms and biases are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.mul_(1 + 0.2 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)


def make_documents(lengths, vocabulary=97, untrained=()):
    """Random tokens, half of them trained; none in the documents whose numbers are in `untrained`."""
    generator = np.random.default_rng(3)
    documents = []
    for i, n in enumerate(lengths):
        trained = np.zeros(n, np.uint8) if i in untrained else (generator.random(n) < 0.5).astype(np.uint8)
        trained[0] = 0
        documents.append((generator.integers(0, vocabulary, n).astype(np.int32), trained))
    return documents


def write_tokens(path, documents, vocabulary):
    starts = np.cumsum([0] + [len(ids) for ids, _ in documents]).astype(np.int64)
    save_file({"ids": torch.from_numpy(np.concatenate([d[0] for d in documents])), "trained": torch.from_numpy(np.concatenate([d[1] for d in documents])), "starts": torch.from_numpy(starts)},
              path, metadata={"format": "ulysses-tokens-1", "vocabulary": str(vocabulary)})


@dataclasses.dataclass
class Run:
    """What the engine did: metrics of each step, gradients of step 1 before clipping, saved weights, stderr of rank 0, folder of dumps."""
    rows: list
    gradients: dict
    weights: dict
    said: str
    dump: pathlib.Path

    @property
    def loss(self):
        return self.rows[0]["loss"]


class EngineFailed(AssertionError):
    """`code`: the exit code, below 0 a signal; None where it took too long."""

    def __init__(self, code, said):
        super().__init__(f"{'took too long' if code is None else f'exit code {code}'}: {said}")
        self.code = code


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_engine(folder, documents, *, vocabulary=97, steps=1, dtype="fp32", device="cpu", ranks=1, sequence=1, micro_batch=1, more="", save=True, name="engine",
               engine=ENGINE, threads=1, timeout=120):
    """Trains folder/model, all documents in every step, so that their order does not matter. Writes into folder/name.

    `ranks` processes, `sequence` of them for each sequence; on a GPU they share the first one. `more`: lines of the recipe.
    """
    out = folder / name
    out.mkdir()
    write_tokens(out / "tokens.safetensors", documents, vocabulary)
    replicas = ranks // sequence
    checkpoint = f"checkpoint: [{{type: huggingface, output_dir: {out}/saved, save_end_of_training: true}}]" if save else ""
    (out / "run.yml").write_text(f"""
type: sft
model: {{name_or_path: {folder}/model, dtype: {dtype}}}
data: {{sources: [{folder}/none.jsonl], max_length: {max(len(ids) for ids, _ in documents)}}}
optimizer: {{learning_rate: 3.0e-3, weight_decay: 0.1, betas: [0.9, 0.95]}}
scheduler: {{name: cosine, warmup_ratio: 0.2}}
deepspeed: {{zero_optimization: {{stage: 3}}, gradient_clipping: 0.5}}
sequence_parallel_size: {sequence}
micro_batch_size: {micro_batch}
gradient_accumulation_steps: {-(-len(documents) // (micro_batch * replicas))}
train_log_metrics_path: {out}/metrics.jsonl
epochs: {steps}
{checkpoint}
{more}
""")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    env["OMP_NUM_THREADS"] = str(threads)
    if device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [engine, "train", out / "run.yml", "--model", folder / "model", "--tokens", out / "tokens.safetensors", "--device", device, "--dump", out / "dump"]
    port, processes = free_port(), []
    for rank in range(ranks):
        place = dict(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ULYSSES_SHARE_GPU="1")
        log = open(out / f"rank_{rank}.log", "w")
        processes.append(subprocess.Popen(command, env={**env, **place} if ranks > 1 else env, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes) and time.monotonic() < end:
        time.sleep(0.02)
    ended, failed = [p.poll() is not None for p in processes], [p.returncode for p in processes if p.poll()]
    for p in processes:  # where one failed, the others wait for it
        if p.poll() is None:
            p.kill()
            p.wait()
    logs = [(out / f"rank_{rank}.log").read_text() for rank in range(ranks)]
    if failed or not all(ended):
        raise EngineFailed(failed[0] if failed else None, "\n".join(logs))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["iter"] for r in rows] == list(range(1, steps + 1))
    weights = load_file(out / "saved" / f"global_step_{steps}" / "model.safetensors") if save else {}
    return Run(rows, load_file(out / "dump" / "step_1.safetensors"), weights, logs[0], out / "dump")


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of Transformers for long sequences in fp32: torch's efficient kernel has no groups, so heads are repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if query.is_cuda else [SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("repeated", attend)  # a name without a mask function: no mask is made


def mean_loss_gradients(model, documents):
    """The mean loss over all trained tokens, and its gradients, added up in fp32. Documents of one length form batches."""
    device = next(model.parameters()).device
    total = max(1, sum(int(trained[1:].sum()) for _, trained in documents))
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    by_length, loss_sum = {}, 0.0
    for document in documents:
        by_length.setdefault(len(document[0]), []).append(document)
    for n, alike in by_length.items():
        if n < 2:
            continue
        at_once = max(1, TOKENS_AT_ONCE // n)
        for i in range(0, len(alike), at_once):
            ids = torch.from_numpy(np.stack([d[0] for d in alike[i:i + at_once]]).astype(np.int64)).to(device)
            trained = torch.from_numpy(np.stack([d[1] for d in alike[i:i + at_once]])).to(device)
            if hasattr(model.model.rotary_emb, "max_seq_len_cached"):
                model.model.rotary_emb.max_seq_len_cached = 0  # a dynamic table is that of this sequence, not of the longest so far
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            target = ids[:, 1:].masked_fill(trained[:, 1:] == 0, -100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum") / total
            loss.backward()
            loss_sum += loss.item()
            for name, p in model.named_parameters():
                sums[name] += p.grad
                p.grad = None
    return loss_sum, sums


def decays(name):
    return not any(part in name.lower() for part in ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight"))


def run_transformers(folder, documents, steps=1, dtype=torch.float32, device="cpu", attention="eager"):
    """Trains as run_engine's recipe says, with fp32 masters: (rows, gradients of step 1, weights). Everything ends on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation=attention).to(device)
    masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([{"params": [p for n, p in masters.items() if decays(n)], "weight_decay": 0.1}, {"params": [p for n, p in masters.items() if not decays(n)], "weight_decay": 0.0}],
                                  lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=int(0.2 * steps), num_training_steps=steps)
    rows, first = [], None
    for _ in range(steps):
        lr = schedule.get_last_lr()[0]
        loss, gradients = mean_loss_gradients(model, documents)
        if first is None:
            first = {n: g.cpu().clone() for n, g in gradients.items()}
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
        for n, p in masters.items():
            p.grad = gradients[n].mul_(torch.clamp(0.5 / (norm + 1e-6), max=1.0))
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(masters[n])
        rows.append({"loss": loss, "lr": lr, "grad_norm": norm.item()})
    return rows, first, {n: p.detach().cpu() for n, p in model.named_parameters()}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item()
