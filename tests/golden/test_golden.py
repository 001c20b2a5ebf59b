"""Golden tests: the engine against Transformers with autograd, on the CPU.

Every case makes a tiny model with Transformers, trains it with the engine (all documents in every step, so that the order
of samples does not matter) and with autograd and torch's AdamW, and compares loss, every gradient, and twenty updates.
"""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, get_scheduler

torch.set_num_threads(1)
ROOT = pathlib.Path(__file__).resolve().parents[2]
ENGINE = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")) / "ulysses-engine"
LENGTHS = (37, 5, 64, 1, 50)
STEPS = 20

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


def make_model(folder, name, dtype=torch.float32):
    """Saves a tiny model whose norms and biases are not trivial."""
    config_class, extra = CASES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**BASE, **extra}), attn_implementation="eager")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.mul_(1 + 0.2 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)


def make_documents():
    generator = np.random.default_rng(3)
    documents = []
    for i, n in enumerate(LENGTHS):
        trained = np.zeros(n, np.uint8) if i == 1 else (generator.random(n) < 0.5).astype(np.uint8)
        trained[0] = 0
        documents.append((generator.integers(0, 97, n).astype(np.int32), trained))
    return documents


def write_tokens(path, documents):
    starts = np.cumsum([0] + [len(ids) for ids, _ in documents]).astype(np.int64)
    save_file({"ids": torch.from_numpy(np.concatenate([d[0] for d in documents])), "trained": torch.from_numpy(np.concatenate([d[1] for d in documents])), "starts": torch.from_numpy(starts)},
              path, metadata={"format": "ulysses-tokens-1", "vocabulary": "97"})


def write_recipe(path, folder, steps, dtype="fp32"):
    path.write_text(f"""
type: sft
model: {{name_or_path: {folder}/model, dtype: {dtype}}}
data: {{sources: [{folder}/none.jsonl], max_length: 128}}
optimizer: {{learning_rate: 3.0e-3, weight_decay: 0.1, betas: [0.9, 0.95]}}
scheduler: {{name: cosine, warmup_ratio: 0.2}}
deepspeed: {{zero_optimization: {{stage: 3}}, gradient_clipping: 0.5}}
gradient_accumulation_steps: {len(LENGTHS)}
train_log_metrics_path: {folder}/metrics.jsonl
epochs: {steps}
checkpoint: [{{type: huggingface, output_dir: {folder}/out, save_end_of_training: true}}]
""")


def run_engine(folder, steps=STEPS, dtype="fp32", ranks=1):
    """Trains and returns (losses, gradients of step 1, saved weights)."""
    write_tokens(folder / "tokens.safetensors", make_documents())
    write_recipe(folder / "run.yml", folder, steps, dtype)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(key, None)
    done = subprocess.run([ENGINE, "train", folder / "run.yml", "--model", folder / "model", "--tokens", folder / "tokens.safetensors", "--device", "cpu", "--dump", folder / "dump"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["iter"] for r in rows] == list(range(1, steps + 1))
    return rows, load_file(folder / "dump" / "step_1.safetensors"), load_file(folder / "out" / f"global_step_{steps}" / "model.safetensors")


def step_gradients(model, documents):
    """Adds the gradient of the mean loss over all trained tokens; returns the loss."""
    total = sum(int(trained[1:].sum()) for _, trained in documents)
    loss_sum = 0.0
    for ids, trained in documents:
        if len(ids) < 2:
            continue
        if hasattr(model.model.rotary_emb, "max_seq_len_cached"):
            model.model.rotary_emb.max_seq_len_cached = 0  # a dynamic table is that of this sequence, not of the longest so far
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].float()
        target = torch.from_numpy(np.where(trained[1:] != 0, ids[1:], -100).astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / total
        loss.backward()
        loss_sum += loss.item()
    return loss_sum


def decays(name):
    return not any(part in name.lower() for part in ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight"))


def run_transformers(folder, steps=STEPS, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="eager")
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [p for n, p in named if decays(n)], "weight_decay": 0.1}, {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=int(0.2 * steps), num_training_steps=steps)
    documents, rows, first = make_documents(), [], None
    for _ in range(steps):
        lr = schedule.get_last_lr()[0]
        loss = step_gradients(model, documents)
        if first is None:
            first = {n: p.grad.float().clone() for n, p in named}
        norm = torch.linalg.vector_norm(torch.stack([p.grad.float().norm() for _, p in named]))
        for _, p in named:
            p.grad.mul_(torch.clamp(0.5 / (norm + 1e-6), max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rows.append({"loss": loss, "lr": lr, "grad_norm": norm.item()})
    return rows, first, {n: p.detach().clone() for n, p in named}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_twenty_updates_equal_transformers(name, tmp_path):
    make_model(tmp_path / "model", name)
    rows, gradients, weights = run_engine(tmp_path)
    expected_rows, expected_gradients, expected_weights = run_transformers(tmp_path)
    assert rows[0]["loss"] == pytest.approx(expected_rows[0]["loss"], rel=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(expected_rows[0]["grad_norm"], rel=1e-4)
    assert set(gradients) == set(expected_gradients)
    largest = max(g.norm() for g in expected_gradients.values())
    for key, g in expected_gradients.items():
        if g.norm() > 1e-6 * largest:  # a key bias has no gradient but rounding
            assert relative(gradients[key], g) < 1e-4, key
        else:
            assert gradients[key].norm() < 1e-5 * largest, key
    for mine, theirs in zip(rows, expected_rows):
        assert mine["lr"] == pytest.approx(theirs["lr"], rel=1e-12, abs=1e-18)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for key, w in expected_weights.items():
        if key in weights and not key.endswith("k_proj.bias"):
            assert relative(weights[key], w) < 1e-4, key


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_bf16_is_at_most_twice_as_far_from_fp32_as_transformers_bf16(name, tmp_path):
    make_model(tmp_path / "model", name, torch.bfloat16)
    rows, gradients, _ = run_engine(tmp_path, steps=1, dtype="bf16")
    true_rows, true_gradients, _ = run_transformers(tmp_path, steps=1, dtype=torch.float32)
    bf16_rows, bf16_gradients, _ = run_transformers(tmp_path, steps=1, dtype=torch.bfloat16)

    def error(found):
        return sum(((found[k].float() - g).norm() / g.norm().clamp_min(1e-6)).item() ** 2 for k, g in true_gradients.items() if not k.endswith("k_proj.bias")) ** 0.5

    assert error(gradients) <= 2 * error(bf16_gradients)
    assert abs(rows[0]["loss"] - true_rows[0]["loss"]) <= max(2 * abs(bf16_rows[0]["loss"] - true_rows[0]["loss"]), 1e-3 * true_rows[0]["loss"])
