"""The oracle of the golden tests: tiny models trained by Transformers with autograd, in fp32 on the CPU.

    folder = make_model("qwen3", tmp / "model")
    make_token_file(tmp / "tokens.safetensors", docs, trained)
    reference = run_reference(folder, steps)            # losses, gradients, norms, weights
    loss, gradients = read_dump(tmp / "dump", 1)        # what ULYSSES_DUMP has written
    worst(gradients, reference.steps[0].gradients)      # ('model.norm.weight', 3.1e-7)

A document is (ids, trained): two lists of equal length, trained[i] true where ids[i] is a target. A micro-batch is a list
of documents, a step a list of micro-batches. Documents are run one by one, so nothing can leak between them.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

# Shapes on purpose odd: heads that two or three ranks share unevenly, an MLP and a vocabulary that no tile divides.
_COMMON = dict(
    vocab_size=331, hidden_size=48, intermediate_size=89, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
# Test models: the configuration's class, the model's class, and what differs from _COMMON.
KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", dict(tie_word_embeddings=True)),
    "llama3_rope": ("LlamaConfig", "LlamaForCausalLM", dict(rope_parameters=_LLAMA3_ROPE)),
    "llama_biases": ("LlamaConfig", "LlamaForCausalLM", dict(attention_bias=True, mlp_bias=True)),
    "llama_one_kv": ("LlamaConfig", "LlamaForCausalLM", dict(num_attention_heads=3, num_key_value_heads=1, head_dim=16)),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=None)),
    "mistral_head_dim": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=None, head_dim=20)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", dict(num_attention_heads=7, num_key_value_heads=1, hidden_size=56)),
    "qwen2_tied": ("Qwen2Config", "Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=20)),
    "qwen3_tied": ("Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=16, tie_word_embeddings=True)),
}
NO_DECAY = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")


@dataclass
class Step:
    """One optimizer step. Gradients by Hugging Face name, before clipping, of the normalised loss."""

    loss: float
    num_trained: int
    norm: float
    learning_rate: float
    gradients: dict


@dataclass
class Reference:
    steps: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)      # after the last step

    @property
    def losses(self):
        return [step.loss for step in self.steps]


def make_model(kind, folder, seed=0, **changes):
    """Saves a random fp32 model of a row of KINDS into `folder` and returns the folder; `changes` override its
    configuration. Norm weights and biases are random too, so that a gradient or a decay gone astray shows."""
    import transformers

    config_class, model_class, own = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**_COMMON, **own, **changes})
    model = getattr(transformers, model_class)(config).to(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return Path(folder)


def make_documents(lengths, seed=0, vocab_size=331, share=0.6):
    """Returns random documents of the given lengths; about `share` of the tokens are targets, the first never."""
    draw = torch.Generator().manual_seed(seed)
    documents = []
    for n in lengths:
        ids = torch.randint(3, vocab_size, (n,), generator=draw).tolist()
        trained = (torch.rand(n, generator=draw) < share).tolist()
        documents.append((ids, [False] * min(n, 1) + trained[1:]))
    return documents


def make_token_file(path, docs, trained):
    """Writes the token file of `docs` (lists of ids) and `trained` (lists of flags), as `prepare` would."""
    from ulysses_plus.token_file import TokenFileWriter

    writer = TokenFileWriter(str(path))
    for ids, flags in zip(docs, trained, strict=True):
        writer.append(list(ids), [int(flag) for flag in flags])
    writer.finish({"made by": "a test"})
    return Path(path)


def run_reference(
    folder, steps, *, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.999), clip=1.0, schedule="linear", warmup_ratio=0.1,
    schedule_arguments=None, horizon=None, reduction="token", attention="sdpa", dtype=torch.float32,
):
    """Trains the model in `folder` on `steps` and returns a Reference.

    steps       [[[(ids, trained), ...], ...], ...]: step, micro-batch, document
    horizon     updates of the schedule; default len(steps)
    clip        largest global norm, as torch.nn.utils.clip_grad_norm_ applies it (+ 1e-6); 0: off
    reduction   "token": every trained token of a step weighs the same; "sample": every micro-batch that has any does
    attention   "sdpa" or "eager"
    """
    from transformers import AutoModelForCausalLM, get_scheduler

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).train()
    parameters = dict(model.named_parameters())
    decayed = [p for name, p in parameters.items() if not _undecayed(name)]
    others = [p for name, p in parameters.items() if _undecayed(name)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=1e-8)
    horizon = horizon or len(steps)
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=int(warmup_ratio * horizon), num_training_steps=horizon,
        scheduler_specific_kwargs=schedule_arguments or {},
    )
    out = Reference()
    for micro_batches in steps:
        optimizer.zero_grad(set_to_none=True)
        loss, count = _backward(model, micro_batches, reduction)
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()
        }
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        rate = optimizer.param_groups[0]["lr"]
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
        scheduler.step()
        out.steps.append(Step(loss, count, norm, rate, gradients))
    out.weights = {name: p.detach().clone() for name, p in parameters.items()}
    return out


def logits(folder, ids, attention="sdpa"):
    """Returns the fp32 logits [len(ids), V] of one document."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def read_dump(folder, step):
    """Returns (loss, {name: gradient}) of step `step`, counted from 1, as written under ULYSSES_DUMP."""
    from safetensors import safe_open

    with safe_open(str(Path(folder) / f"step_{step}.safetensors"), framework="pt") as file:
        return float(file.metadata()["loss"]), {name: file.get_tensor(name) for name in file.keys()}


def worst(found, expected):
    """Returns (name, error) of the tensor that differs most: largest difference over the largest expected magnitude of
    that tensor (over 1e-12). Names must agree."""
    assert sorted(found) == sorted(expected), sorted(set(found) ^ set(expected))
    errors = {}
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, f"{name}: {tuple(found[name].shape)} vs {tuple(tensor.shape)}"
        difference = (found[name].double() - tensor.double()).abs().max().item()
        errors[name] = difference / max(tensor.double().abs().max().item(), 1e-12)
    return max(errors.items(), key=lambda item: item[1] if item[1] == item[1] else math.inf)


def _undecayed(name):
    return any(part in name.lower() for part in NO_DECAY)


def _backward(model, micro_batches, reduction):
    """Adds the step's gradients; returns (normalised loss, number of trained tokens)."""
    counts = [sum(sum(map(bool, trained[1:])) for _, trained in documents) for documents in micro_batches]
    total, speaking = sum(counts), sum(count > 0 for count in counts)
    sum_of_losses = 0.0
    for documents, count in zip(micro_batches, counts):
        scale = 0.0 if count == 0 else 1 / total if reduction == "token" else 1 / (speaking * count)
        for ids, trained in documents:
            targets = torch.tensor([id_ if flag else -100 for id_, flag in zip(ids, trained)][1:])
            if len(ids) < 2 or not (targets >= 0).any():
                continue
            scores = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(scores, targets, ignore_index=-100, reduction="sum") * scale
            loss.backward()
            sum_of_losses += loss.item()
    return sum_of_losses, total
