#!/usr/bin/env python3
"""The same loss: a model of 1B parameters on real text at 16,384 tokens, this engine beside Transformers + Liger.

  bench/loss_curve.py prepare FOLDER --text FILE    # tokenizer (BPE of that text), recipe, token cache; no GPU
  bench/loss_curve.py weights FOLDER --seed 0       # random weights, saved as Transformers does
  bench/loss_curve.py ours FOLDER --seed 0          # trains with them: optimizer and activations off the GPU, within --gpu-memory
  bench/loss_curve.py peer FOLDER --seed 0          # the same with Transformers, Liger's kernels and cuDNN attention
  bench/loss_curve.py draw FOLDER OUT.svg           # curves of all runs in FOLDER, and the table of their ends

The shape is Llama-3.2-1B's with that tokenizer's vocabulary: 16 layers, D 2048, F 8192, 32:8 heads of 64, tied embeddings. The text is
one document, cut into samples of exactly 16,384 tokens; both systems take them in the order that this engine draws from the
recipe's seed. The peer keeps bf16 weights and fp32 master weights and moments, clips at norm 1, and decays what the engine
decays. Runs lie in FOLDER as SYSTEM-SEED.jsonl: a line a step with iter, loss, grad_norm, step_time.
"""

import argparse
import datetime
import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

import hf_step

ROOT = pathlib.Path(__file__).resolve().parents[1]
LENGTH, VOCABULARY, DATA_SEED = 16384, 32000, 42
SHAPE = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=VOCABULARY,
             max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
RATE, DECAY, BETAS, WARMUP = 3e-4, 0.1, (0.9, 0.95), 0.1


def prepare(folder, text, build):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = text.read_text(encoding="utf-8", errors="replace")
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.train_from_iterator((words[i:i + 100000] for i in range(0, len(words), 100000)),
                              trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "tokenizer")
    with gzip.open(folder / "text.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": words}) + "\n")
    (folder / "run.yml").write_text(f"""# 1B parameters on real text; the bench gives model, seed and memory.
type: causal
model: {{name_or_path: base-0, dtype: bf16}}
tokenizer: {{name_or_path: tokenizer}}
data: {{sources: [text.jsonl.gz], max_length: {LENGTH}, seed: {DATA_SEED}, cache_dir: cache}}
seed: {DATA_SEED}
optimizer: {{learning_rate: {RATE}, weight_decay: {DECAY}, betas: [{BETAS[0]}, {BETAS[1]}]}}
scheduler: {{name: cosine, warmup_ratio: {WARMUP}}}
deepspeed: {{gradient_clipping: 1.0, zero_optimization: {{offload_optimizer: {{device: cpu}}}}}}
activation_checkpoint_cpu_offload: true
""")
    (folder / "base-0").mkdir(exist_ok=True)
    (folder / "base-0" / "config.json").write_text(json.dumps(dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rope_theta=500000.0, torch_dtype="bfloat16", **SHAPE), indent=1))
    subprocess.run([build / "ulysses", "prepare", "run.yml"], check=True, cwd=folder)


def weights(folder, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM._from_config(LlamaConfig(rope_parameters=dict(rope_type="default", rope_theta=500000.0), **SHAPE), dtype=torch.bfloat16).save_pretrained(folder / f"base-{seed}")


def ours(folder, seed, steps, build, more):
    metrics = folder.resolve() / f"ulysses-{seed}.jsonl"
    metrics.unlink(missing_ok=True)
    done = subprocess.run([build.resolve() / "ulysses", "train", "run.yml", "--device", "cuda", f"model.name_or_path=base-{seed}", f"train_iters={steps}", f"train_log_metrics_path={metrics}", *more], cwd=folder)
    sys.exit(done.returncode)


def permutation(n, seed, epoch):
    """The engine's order of n samples (src/data/sampler.cc), written down a second time."""
    mask = 2**64 - 1

    def mix():
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    def below(bound):
        while True:
            product = mix() * bound
            if product & mask >= (2**64 - bound) % bound:
                return product >> 64

    state = seed
    state = mix() ^ epoch
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = below(i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def samples(folder):
    """The samples [n, LENGTH] that the engine makes of the token file, in the order in which it trains on them."""
    from safetensors.numpy import load_file

    (path,) = (folder / "cache").rglob("*.safetensors")
    ids = load_file(path)["ids"]
    count = len(ids) // LENGTH
    return ids[:count * LENGTH].reshape(count, LENGTH)[permutation(count, DATA_SEED, 0)]


def peer(folder, seed, steps):
    hf_step.find_liger()
    import torch
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True, cross_entropy=False)
    from transformers import LlamaForCausalLM, get_scheduler

    data = torch.from_numpy(samples(folder)).long()
    model = LlamaForCausalLM.from_pretrained(folder / f"base-{seed}", dtype=torch.bfloat16, attn_implementation="sdpa").cuda().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False})
    held = list(model.parameters())
    masters = [torch.nn.Parameter(p.detach().float()) for p in held]
    optimizer = torch.optim.AdamW([{"params": [m for m in masters if m.dim() > 1], "weight_decay": DECAY}, {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0}],
                                  lr=RATE, betas=BETAS, eps=1e-8, fused=True)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=int(WARMUP * steps), num_training_steps=steps)
    with hf_step.attention("cudnn"), open(folder / f"transformers-{seed}.jsonl", "w") as log:
        for step in range(steps):
            begin = time.perf_counter()
            ids = data[step:step + 1].cuda()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            for master, p in zip(masters, held):
                master.grad, p.grad = p.grad.float(), None
            norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                for master, p in zip(masters, held):
                    p.copy_(master)
            row = {"iter": step + 1, "loss": loss.item(), "grad_norm": norm.item()}
            torch.cuda.synchronize()
            log.write(json.dumps(row | {"step_time": time.perf_counter() - begin}) + "\n")
            log.flush()
            if step % 20 == 0:
                print(f"peer {seed}: step {step + 1} of {steps}, loss {row['loss']:.4f}", file=sys.stderr)
    print(f"peer {seed}: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", file=sys.stderr)


def runs(folder):
    """By name, the rows of each run in the folder."""
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("*-[0-9].jsonl"))}


def end(rows, last=30):
    """Mean loss of the last steps."""
    return sum(row["loss"] for row in rows[-last:]) / len(rows[-last:])


def speed(rows):
    """Tokens a second after the first ten steps, by the median step."""
    times = sorted(row["step_time"] for row in rows[10:])
    return LENGTH / times[len(times) // 2]


def draw(folder, out, machine):
    found = runs(folder)
    width, height, left, bottom = 900, 480, 60, 40
    steps = max(len(rows) for rows in found.values())
    low, high = (pick(row["loss"] for rows in found.values() for row in rows) for pick in (min, max))
    low, high = int(low * 2) / 2, int(high * 2 + 1) / 2

    def place(step, loss):
        return f"{left + (width - left - 20) * step / steps:.1f},{10 + (height - bottom - 10) * (high - loss) / (high - low):.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13"><rect width="{width}" height="{height}" fill="white"/>']
    for loss in range(int(low) + (low > int(low)), int(high) + 1):
        y = place(0, loss).split(",")[1]
        parts.append(f'<path d="M{left} {y}H{width - 20}" stroke="#ddd"/><text x="{left - 8}" y="{y}" text-anchor="end" dominant-baseline="middle">{loss}</text>')
    for step in range(0, steps + 1, 50):
        x = place(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">step of {LENGTH:,} tokens</text><text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">loss</text>')
    for i, (name, rows) in enumerate(found.items()):
        system, seed = name.rsplit("-", 1)
        colour, wide = {"ulysses": ("#c0392b", 1.2), "transformers": ("#2c6fbb", 2.6 if seed == "0" else 1.0)}[system]
        dash = "" if seed == "0" else ' stroke-dasharray="5 3"'
        line = f'stroke="{colour}" stroke-width="{wide}" stroke-opacity="{0.9 if system == "ulysses" else 0.6}"{dash} fill="none"'
        # What is behind first: the peer's curve is broad, ours is drawn thin upon it.
        parts.append(f'<polyline points="{" ".join(place(row["iter"], row["loss"]) for row in rows)}" {line}/>')
        label = {"ulysses": "Ulysses Plus", "transformers": "Transformers + Liger + cuDNN"}[system]
        parts.append(f'<path d="M{width - 530} {30 + 20 * i}h30" {line}/><text x="{width - 492}" y="{34 + 20 * i}">{label}, seed {seed}: ends at {end(rows):.4f}, {speed(rows):,.0f} tokens/s</text>')
    out.write_text("\n".join([*parts, "</svg>"]) + "\n")
    stamp = datetime.datetime.now(datetime.timezone.utc)
    with open(ROOT / "bench" / "results" / "loss_curve.jsonl", "a") as file:
        for name, rows in found.items():
            system, seed = name.rsplit("-", 1)
            row = {"run": stamp.strftime("%Y%m%dT%H%M%S"), "system": system, "seed": int(seed), "length": LENGTH, "steps": len(rows), "final_loss": round(end(rows), 5), "tokens_per_second": round(speed(rows), 1),
                   "loss": [round(row["loss"], 4) for row in rows], "command": f"bench/loss_curve.py {'ours' if system == 'ulysses' else 'peer'} FOLDER --seed {seed}", "machine": machine, "date": stamp.date().isoformat()}
            file.write(json.dumps(row) + "\n")
            print(f"{name:16} final loss {end(rows):.4f}  {speed(rows):,.0f} tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "weights", "ours", "peer", "draw"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path, nargs="?")
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gpu-memory", default="14GiB", help="of ours")
    parser.add_argument("--machine", default="")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    a = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if a.what == "prepare":
        prepare(a.folder, a.text, a.build.resolve())
    elif a.what == "weights":
        weights(a.folder, a.seed)
    elif a.what == "ours":
        ours(a.folder, a.seed, a.steps, a.build, [f"memory.gpu={a.gpu_memory}"])
    elif a.what == "peer":
        peer(a.folder, a.seed, a.steps)
    else:
        draw(a.folder, a.out, a.machine)


if __name__ == "__main__":
    main()
