#!/usr/bin/env python3
"""Forward and backward of the Llama-3.1-8B shape by the fastest peer known: Transformers + Liger + cuDNN attention.

Random bf16 weights made on the GPU, batch 1, every layer checkpointed (not reentrant), fused linear cross-entropy, no
optimizer: gradients are dropped between steps. They are bf16, which is less to write and to keep than the fp32 gradients
that bench/vs_hf.py compares with. Grouped heads are not repeated and no mask is made: Transformers passes is_causal.

Prints one JSON object on stdout. A step that does not fit is a row with "error", and exit code 0. Liger is imported from
where Python finds it, else from the wheel in .whl/.

usage: bench/hf_step.py --length 16384 [--seconds 60] [--layers 32] [--warmup 1] [--attention cudnn|flash]
       bench/hf_step.py --check     # 2 layers, short: was cuDNN really used, both ways, without repeating heads?
"""

import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the peer at its best: no memory lost between segments
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHAPE = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256, rms_norm_eps=1e-5,
             rope_parameters=dict(rope_type="default", rope_theta=500000.0), tie_word_embeddings=False, use_cache=False)


def find_liger():
    if importlib.util.find_spec("liger_kernel") is None:
        wheels = sorted((ROOT / ".whl").glob("liger_kernel-*.whl"))
        if not wheels:
            sys.exit("hf_step: liger-kernel is neither installed nor in .whl/")
        folder = tempfile.mkdtemp(prefix="liger-")  # Triton reads its kernels' source from files
        atexit.register(shutil.rmtree, folder, True)
        zipfile.ZipFile(wheels[-1]).extractall(folder)
        sys.path.insert(0, folder)


def make_model(layers, length, checkpoint_every):
    import torch
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True, cross_entropy=False)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=max(131072, length), **SHAPE)
    with torch.device("cuda"):  # drawn by the GPU, in bf16: a second, not minutes
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.train()
    if checkpoint_every:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}, every_n_layers=checkpoint_every)
    return model


@contextlib.contextmanager
def attention(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = {"cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}[name]
    with sdpa_kernel(order, set_priority=True):
        yield


def chosen_backend(length):
    """What attention of this length will run on, asked of torch with tensors like the model's."""
    import torch
    from torch.nn.attention import SDPBackend

    def heads(n):
        return torch.empty(1, length, n, SHAPE["head_dim"], device="cuda", dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)

    q, k, v = heads(SHAPE["num_attention_heads"]), heads(SHAPE["num_key_value_heads"]), heads(SHAPE["num_key_value_heads"])
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=SHAPE["head_dim"] ** -0.5, enable_gqa=True)
    return next((name for name, value in SDPBackend.__members__.items() if int(value) == choice), str(choice))


def step(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def versions():
    import importlib.metadata

    import torch

    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "triton", "liger_kernel")} | {"cudnn": torch.backends.cudnn.version()}


def measure(args):
    import torch

    row = {"system": "transformers + liger + " + ("cudnn" if args.attention == "cudnn" else "fa2"), "length": args.length, "layers": args.layers, "checkpoint_every": args.checkpoint_every}
    seconds = []
    try:
        with attention(args.attention):
            row["attention"] = chosen_backend(args.length)
            if args.attention == "cudnn" and row["attention"] != "CUDNN_ATTENTION":
                sys.exit(f"hf_step: torch would use {row['attention']} for attention, not cuDNN")
            torch.cuda.empty_cache()
            model = make_model(args.layers, args.length, args.checkpoint_every)
            ids = torch.randint(0, SHAPE["vocab_size"], (1, args.length), device="cuda")
            for _ in range(args.warmup):  # compiles Triton's kernels, whatever the length; a plan of cuDNN's is 0.1 s of a long step
                loss = step(model, ids[:, :args.warmup_length or args.length])
            torch.cuda.synchronize()
            while not seconds or sum(seconds) < args.seconds:
                begin = time.perf_counter()
                loss = step(model, ids)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
        row |= {"tokens_per_second": round(args.length * len(seconds) / sum(seconds), 1), "steps": len(seconds), "seconds": round(sum(seconds), 3),
                "step_seconds": [round(s, 4) for s in seconds], "loss": round(loss.item(), 4)}
    except torch.OutOfMemoryError as error:
        row |= {"error": "out of memory", "detail": str(error).splitlines()[0][:200]}
    except RuntimeError as error:
        if "out of memory" not in str(error) and "ALLOC_FAILED" not in str(error):
            raise
        row |= {"error": "out of memory", "detail": str(error).splitlines()[0][:200]}
    free, total = torch.cuda.mem_get_info()
    row |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "driver_peak_gib": round((total - free) / 2**30, 2), "versions": versions()}
    print(json.dumps(row), flush=True)


def check(args):
    """Asserts that the peer runs as it is said to: cuDNN forward and backward, no repeated heads, no mask, no logits."""
    import torch
    import torch.nn.functional as F

    length, calls, real = args.length or 4096, [], F.scaled_dot_product_attention

    def watched(query, key, value, **kwargs):
        calls.append((query.shape[1], key.shape[1], kwargs.get("attn_mask"), kwargs.get("is_causal"), kwargs.get("enable_gqa")))
        return real(query, key, value, **kwargs)

    with attention("cudnn"):
        backend = chosen_backend(length)
        model = make_model(2, length, 1)
        ids = torch.randint(0, SHAPE["vocab_size"], (1, length), device="cuda")
        step(model, ids)
        F.scaled_dot_product_attention = watched
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
                output = model(input_ids=ids, labels=ids, use_cache=False)
                output.loss.backward()
                torch.cuda.synchronize()
        finally:
            F.scaled_dot_product_attention = real
    names = {e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA}
    cudnn = sorted(n for n in names if "cudnn" in n.lower() and ("sdpa" in n.lower() or "flash" in n.lower()))
    other = sorted(n for n in names if "flash_fwd" in n or "flash_bwd" in n or "fmha_cutlass" in n)
    assert backend == "CUDNN_ATTENTION", backend
    assert any("fprop" in n or "fwd" in n for n in cudnn) and any("bprop" in n or "bwd" in n for n in cudnn), sorted(names)
    assert not other, other
    assert len(calls) == 4 and set(calls) == {(SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], None, True, True)}, calls  # 2 layers, each twice: checkpointed
    assert output.logits is None and abs(output.loss.item() - 12.58) < 0.3, output.loss  # ln V, and half the variance of logits: D 0.02^2
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 and torch.isfinite(p.grad).all() for p in model.parameters())
    print(json.dumps({"check": "ok", "length": length, "loss": round(output.loss.item(), 4), "attention_kernels": [n[:160] for n in cudnn],
                      "liger_kernels": sorted(n for n in names if n.startswith(("_rms_norm", "_swiglu", "_triton_rope", "liger_"))), "versions": versions()}), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int)
    parser.add_argument("--seconds", type=float, default=60, help="at least so long, whole steps")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=1, help="steps that do not count")
    parser.add_argument("--warmup-length", type=int, default=0, help="their tokens; by default --length")
    parser.add_argument("--attention", choices=["cudnn", "flash"], default="cudnn")
    parser.add_argument("--checkpoint-every", type=int, default=1, help="recompute every n-th layer only; 0: none")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not args.check and not args.length:
        parser.error("--length is needed")
    find_liger()
    check(args) if args.check else measure(args)


if __name__ == "__main__":
    main()
