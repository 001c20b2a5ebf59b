"""Golden tests: the engine against Transformers with autograd, on the CPU.

Every case makes a tiny model with Transformers, trains it with the engine (all documents in every step, so that the order
of samples does not matter) and with autograd and torch's AdamW, and compares loss, every gradient, and twenty updates.
"""

import pytest
import torch

from sides import CASES, make_config, make_documents, make_model, relative, run_engine, run_transformers

torch.set_num_threads(1)
DOCUMENTS = make_documents((37, 5, 64, 1, 50), untrained=(1,))
STEPS = 20


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_twenty_updates_equal_transformers(name, tmp_path):
    make_model(tmp_path / "model", make_config(name))
    run = run_engine(tmp_path, DOCUMENTS, steps=STEPS)
    expected_rows, expected_gradients, expected_weights = run_transformers(tmp_path, DOCUMENTS, STEPS)
    assert run.rows[0]["loss"] == pytest.approx(expected_rows[0]["loss"], rel=1e-6)
    assert run.rows[0]["grad_norm"] == pytest.approx(expected_rows[0]["grad_norm"], rel=1e-4)
    assert set(run.gradients) == set(expected_gradients)
    largest = max(g.norm() for g in expected_gradients.values())
    for key, g in expected_gradients.items():
        if g.norm() > 1e-6 * largest:  # a key bias has no gradient but rounding
            assert relative(run.gradients[key], g) < 1e-4, key
        else:
            assert run.gradients[key].norm() < 1e-5 * largest, key
    for mine, theirs in zip(run.rows, expected_rows):
        assert mine["lr"] == pytest.approx(theirs["lr"], rel=1e-12, abs=1e-18)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for key, w in expected_weights.items():
        if key in run.weights and not key.endswith("k_proj.bias"):
            assert relative(run.weights[key], w) < 1e-4, key


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_bf16_is_at_most_twice_as_far_from_fp32_as_transformers_bf16(name, tmp_path):
    make_model(tmp_path / "model", make_config(name), torch.bfloat16)
    run = run_engine(tmp_path, DOCUMENTS, dtype="bf16")
    true_rows, true_gradients, _ = run_transformers(tmp_path, DOCUMENTS)
    bf16_rows, bf16_gradients, _ = run_transformers(tmp_path, DOCUMENTS, dtype=torch.bfloat16)

    def error(found):
        return sum(((found[k].float() - g).norm() / g.norm().clamp_min(1e-6)).item() ** 2 for k, g in true_gradients.items() if not k.endswith("k_proj.bias")) ** 0.5

    assert error(run.gradients) <= 2 * error(bf16_gradients)
    assert abs(run.loss - true_rows[0]["loss"]) <= max(2 * abs(bf16_rows[0]["loss"] - true_rows[0]["loss"]), 1e-3 * true_rows[0]["loss"])
