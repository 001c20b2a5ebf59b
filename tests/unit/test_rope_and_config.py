"""Configurations read here against Transformers: dimensions, names and shapes of parameters, rope tables.

The probe is build/model_probe, or $ULYSSES_BUILD/model_probe.
"""
import json
import os
import pathlib
import subprocess

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BUILD = pathlib.Path(os.environ.get("ULYSSES_BUILD", pathlib.Path(__file__).parents[2] / "build"))
LENGTHS = [1, 100, 256, 257, 1000, 5000, 1_000_000]

TINY = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=101,
            max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
ROPES = {
    "default": {},
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "dynamic_odd_factor": dict(rope_type="dynamic", factor=1.7),
    "llama3": LLAMA3,
    "llama3_of_8b": dict(LLAMA3, original_max_position_embeddings=8192),
    "yarn": YARN,
    "yarn_not_truncated": dict(YARN, truncate=False),
    "yarn_attention_factor": dict(YARN, attention_factor=0.8),
    "yarn_mscale": dict(YARN, mscale=0.707, mscale_all_dim=1.3),
    "yarn_mscale_alone": dict(YARN, mscale=0.707),
    "yarn_betas": dict(YARN, beta_fast=16, beta_slow=2),
    "yarn_long": dict(YARN, factor=4, original_max_position_embeddings=32768),
}
CASES = {
    "llama": ("llama", {}),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama_attention_bias": ("llama", dict(attention_bias=True)),
    "llama_tied": ("llama", dict(tie_word_embeddings=True)),
    "llama_head_dim": ("llama", dict(head_dim=32)),
    "llama_head_dim_null": ("llama", dict(head_dim=None)),
    "llama_kv_heads_null": ("llama", dict(num_key_value_heads=None)),
    "llama_padding": ("llama", dict(pad_token_id=7, rms_norm_eps=1e-5, initializer_range=0.1)),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True, sliding_window=128, max_window_layers=1)),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=128, max_window_layers=1)),
    "qwen2_window_in_no_layer": ("qwen2", dict(use_sliding_window=True, sliding_window=128, max_window_layers=3)),
    "qwen3": ("qwen3", {}),
    "qwen3_head_dim": ("qwen3", dict(head_dim=24, attention_bias=True, tie_word_embeddings=True)),
    "qwen3_window": ("qwen3", dict(use_sliding_window=True, sliding_window=64, max_window_layers=0)),
    "mistral": ("mistral", {}),
    "mistral_no_window": ("mistral", dict(sliding_window=None)),
    "mistral_head_dim_null": ("mistral", dict(head_dim=None, sliding_window=77)),
}
NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}


def spelled(family, extra, rope, theta, spelling):
    """Returns config.json's content as Transformers 4.x or 5.x writes it."""
    config = dict(TINY, architectures=[NAMES[family] + "ForCausalLM"], model_type=family, **{})
    config.update(extra)
    if spelling == "4":
        config.update(rope_theta=theta, torch_dtype="bfloat16", rope_scaling=dict(rope) or None)
    elif spelling == "4_old":
        scaling = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
        config.update(rope_theta=theta, torch_dtype="bfloat16", rope_scaling=scaling or None)
    else:
        config.update(dtype="bfloat16", rope_parameters=dict({"rope_type": "default"}, rope_theta=theta, **rope))
    return config


def probe(folder, config, lengths=()):
    (folder / "config.json").write_text(json.dumps(config))
    return subprocess.run([str(BUILD / "model_probe"), str(folder), *map(str, lengths)], capture_output=True, text=True)


def read(folder, config, lengths=()):
    done = probe(folder, config, lengths)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def model_of(folder):
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))


def ulps(ours, theirs):
    """Returns the largest distance in units of the last place of fp32; all are positive."""
    ours, theirs = torch.tensor(ours, dtype=torch.float64).float(), theirs.float().cpu()
    assert ours.shape == theirs.shape
    return (ours.view(torch.int32) - theirs.view(torch.int32)).abs().max().item()


@pytest.mark.parametrize("spelling", ["4", "4_old", "5"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_names_and_shapes_of_transformers(tmp_path, case, spelling):
    family, extra = CASES[case]
    ours = read(tmp_path, spelled(family, extra, {}, 10000.0, spelling))
    model = model_of(tmp_path)
    config = model.config
    theirs = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    assert {tensor["name"]: tensor["shape"] for tensor in ours["tensors"]} == theirs
    assert ours["num_parameters"] == model.num_parameters()
    assert (ours["D"], ours["F"], ours["N"], ours["L"], ours["V"]) == (48, 80, 4, 3, 101)
    assert ours["K"] == config.num_key_value_heads
    assert ours["H"] == model.model.layers[0].self_attn.head_dim
    assert ours["norm_eps"] == config.rms_norm_eps == model.model.norm.variance_epsilon
    assert ours["initializer_range"] == config.initializer_range
    assert ours["max_positions"] == config.max_position_embeddings
    assert ours["padding_token"] == (-1 if model.model.embed_tokens.padding_idx is None else model.model.embed_tokens.padding_idx)
    slides = any(getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None)) for layer in model.model.layers)
    assert ours["sliding_window"] == (config.sliding_window if slides and family != "llama" else 0)


@pytest.mark.parametrize("family", NAMES)
def test_absent_keys_have_the_defaults_of_the_class(tmp_path, family):
    ours = read(tmp_path, {"model_type": family})
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert ours["architecture"] == NAMES[family] + "ForCausalLM"
    assert {tensor["name"]: tensor["shape"] for tensor in ours["tensors"]} == {name: list(t.shape) for name, t in model.state_dict().items()}
    assert (ours["norm_eps"], ours["max_positions"]) == (config.rms_norm_eps, config.max_position_embeddings)
    assert ours["sliding_window"] == (4096 if family == "mistral" else 0)


@pytest.mark.parametrize("family", NAMES)
def test_a_config_that_transformers_saved_reads_the_same(tmp_path, family):
    before = spelled(family, {}, LLAMA3, 500000.0, "4")
    ours = read(tmp_path, before, LENGTHS)
    saved = tmp_path / "saved"
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(saved)
    assert read(saved, json.loads((saved / "config.json").read_text()), LENGTHS) == ours


@pytest.mark.parametrize("spelling, theta", [("4", 10000.0), ("4_old", 500000), ("5", 1e6)])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rope_tables_are_those_of_transformers(tmp_path, rope, theta, spelling, head_dim):
    config = spelled("llama", dict(head_dim=head_dim), ROPES[rope], theta, spelling)
    ours = read(tmp_path, config, LENGTHS)["rope"]
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for length, table in zip(LENGTHS, ours):
        embedding = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
        embedding(torch.zeros(1), torch.tensor([[length - 1]]))
        assert ulps(table["inverse_frequencies"], embedding.inv_freq) <= (2 if "dynamic" in rope else 1), length
        assert table["attention_factor"] == pytest.approx(embedding.attention_scaling, rel=1e-7)


@pytest.mark.parametrize("family", NAMES)
def test_every_family_reads_rope_alike(tmp_path, family):
    for rope in (LLAMA3, YARN, ROPES["linear"]):
        ours = read(tmp_path, spelled(family, {}, rope, 1e6, "5"), [100])["rope"][0]
        assert ulps(ours["inverse_frequencies"], model_of(tmp_path).model.rotary_emb.inv_freq) <= 1


SAVED = {
    "llama": ("llama", dict(attention_bias=True, mlp_bias=True), LLAMA3),
    "llama_tied": ("llama", dict(tie_word_embeddings=True, head_dim=None), {}),
    "qwen2": ("qwen2", dict(use_sliding_window=False), YARN),
    "qwen3": ("qwen3", dict(head_dim=24, tie_word_embeddings=True), ROPES["dynamic"]),
    "mistral": ("mistral", dict(sliding_window=None), ROPES["linear"]),
}


@pytest.mark.parametrize("max_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("spelling", ["4", "4_old", "5"])
@pytest.mark.parametrize("case", SAVED)
def test_a_saved_model_loads_in_transformers_as_it_was(tmp_path, case, spelling, max_bytes, caplog, recwarn):
    family, extra, rope = SAVED[case]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(spelled(family, extra, rope, 5e5, spelling)))
    torch.manual_seed(0)
    before = model_of(source).float()
    written = (source / "config.json").read_text()
    before.save_pretrained(source, max_shard_size=30_000)
    (source / "config.json").write_text(written)  # in the spelling of this case
    done = subprocess.run([str(BUILD / "model_probe"), str(source), "--copy", str(target), str(max_bytes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    transformers.logging.enable_propagation()
    after, info = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    transformers.logging.disable_propagation()
    assert not [record.message for record in caplog.records if record.levelname != "INFO"]
    assert not [str(warning.message) for warning in recwarn if "transformers" in str(warning.filename)]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert after.config.dtype == torch.float32
    assert type(after) is type(before)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    ids = torch.arange(90)[None] % TINY["vocab_size"]
    assert torch.equal(before.eval()(ids).logits, after.eval()(ids).logits)
    # Transformers 4 reads these two and knows no rope_parameters.
    saved = json.loads((target / "config.json").read_text())
    assert saved["rope_theta"] == 5e5 and "rope_parameters" not in saved
    assert (saved["rope_scaling"] or {}).get("rope_type", "default") == rope.get("rope_type", "default")


def test_refusals_name_the_key_and_what_was_found(tmp_path):
    for extra, words in {
        "hidden_act": ("gelu", 'hidden_act: expected silu, found "gelu"'),
        "attention_dropout": (0.1, "attention_dropout: not supported: expected 0 or none, found 0.1"),
        "pretraining_tp": (2, "pretraining_tp: not supported: expected 1 or none, found 2"),
        "rope_scaling": ({"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}, "longrope"),
        "num_key_value_heads": (3, "num_key_value_heads: expected a divisor of num_attention_heads 4, found 3"),
    }.items():
        config = dict(spelled("llama", {}, {}, 10000.0, "4"), **{extra: words[0]})
        done = probe(tmp_path, config)
        assert done.returncode == 2
        assert str(tmp_path / "config.json") in done.stderr and words[1] in done.stderr, done.stderr
