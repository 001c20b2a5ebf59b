"""The engine on a GPU in bf16 against Transformers in fp32: loss and every gradient.

The rule of two: what the engine computes in bf16 is at most twice as far from fp32 as what Transformers computes in bf16
(with SDPA, and gradients of batches added in fp32: nothing is lost there that would make the rule easier).
  - All tensors together (root of the sum of squared relative errors): strictly twice.
  - Each tensor: twice the larger of Transformers' error there, half of its median error over all tensors, and 1e-3. One
    tensor of a few dozen numbers may come out well by luck; the median says what bf16 gives in this model.
  - A tensor whose true gradient is under 1e-4 of the largest (a key's bias: rounding alone) has to be small too.
  - The loss: twice, or 1e-3 of it.

On a machine with a GPU, with any python that has torch and transformers:
  ULYSSES_TEST_ENGINE=build/ulysses-engine python3 -m pytest tests/gpu -q -n 6     (pytest-xdist; without -n it takes longer)
ULYSSES_TEST_DEVICE=cpu runs the same tests, smaller, on the CPU: to try the tests themselves.
"""

import os
import pathlib
import re
import statistics

import pytest
import torch

import sides
from sides import CASES, EngineFailed, make_config, make_documents, make_model, run_transformers

DEVICE = os.environ.get("ULYSSES_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("no GPU is visible to torch (ULYSSES_TEST_DEVICE=cpu tries the tests on the CPU)", allow_module_level=True)
if not ON_GPU:
    torch.set_num_threads(1)
ENGINE = pathlib.Path(os.environ.get("ULYSSES_TEST_ENGINE", sides.ENGINE)).resolve()
SHORT = make_documents((37, 5, 64, 1, 50), untrained=(1,))
VOCABULARY = 1000
DETERMINISTIC = "deterministic: true" if ON_GPU else ""  # the CPU is so anyway


def run_engine(folder, documents, *, device=DEVICE, more="", memory="16GiB", **kwargs):
    return sides.run_engine(folder, documents, **{"dtype": "bf16", "device": device, "engine": ENGINE, "threads": 2 if ON_GPU else 1, "timeout": 240, "save": False, **kwargs},
                            more=f"memory: {{device: {memory}}}\n{more}")


def make_wide_model(folder, heads=(4, 2), head_size=64, layers=2, vocabulary=VOCABULARY):
    """D 256: enough for heads as they are in real models, little enough for long sequences."""
    make_model(folder, make_config("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_size,
                                   vocab_size=vocabulary, max_position_embeddings=131072, initializer_range=0.05), torch.bfloat16)


class Truth:
    """One step of Transformers in fp32, and in bf16: how far that is from it."""

    def __init__(self, folder, documents):
        rows, self.gradients, _ = run_transformers(folder, documents, device=DEVICE, attention="repeated")
        bf16_rows, bf16, _ = run_transformers(folder, documents, dtype=torch.bfloat16, device=DEVICE, attention="sdpa")
        self.loss, self.bf16_loss = rows[0]["loss"], bf16_rows[0]["loss"]
        self.largest = max(g.norm().item() for g in self.gradients.values())
        self.judged = [k for k, g in self.gradients.items() if g.norm().item() > 1e-4 * self.largest]
        self.bf16_errors = self.errors(bf16)
        if ON_GPU:
            torch.cuda.empty_cache()  # for the engine

    def errors(self, found):
        return {k: ((found[k].float() - self.gradients[k]).norm() / self.gradients[k].norm()).item() for k in self.judged}

    @property
    def bf16_error(self):
        return total(self.bf16_errors)

    def judge(self, run):
        assert set(run.gradients) == set(self.gradients)
        assert all(torch.isfinite(g).all() for g in run.gradients.values())
        errors, typical = self.errors(run.gradients), statistics.median(self.bf16_errors.values())
        worst = max(errors, key=lambda k: errors[k] / self.bf16_errors[k])
        print(f"error {total(errors):.3g}, {total(errors) / self.bf16_error:.2f} of Transformers'; worst {worst}: {errors[worst]:.3g}, {errors[worst] / self.bf16_errors[worst]:.2f} of its; typical {typical:.3g}")
        too_far = {k: (e, self.bf16_errors[k]) for k, e in errors.items() if e > 2 * max(self.bf16_errors[k], typical / 2, 1e-3)}
        assert not too_far, f"tensor: (engine's error, Transformers'), typical {typical:.2g}: {too_far}"
        assert total(errors) <= 2 * self.bf16_error, (total(errors), self.bf16_error)
        for k, g in run.gradients.items():
            if k not in errors:
                assert g.norm().item() < 1e-2 * self.largest, k
        assert abs(run.loss - self.loss) <= max(2 * abs(self.bf16_loss - self.loss), 1e-3 * self.loss), (run.loss, self.loss, self.bf16_loss)

    def judge_alike(self, run, other):
        """Two runs that differ in the order of sums only are nearer to each other than bf16 is to fp32."""
        apart = total({k: ((run.gradients[k] - other.gradients[k]).norm() / self.gradients[k].norm()).item() for k in self.judged})
        print(f"apart {apart:.3g}, {apart / self.bf16_error:.2f} of Transformers' error")
        assert apart <= self.bf16_error, (apart, self.bf16_error)
        assert run.loss == pytest.approx(other.loss, rel=1e-3)


def total(errors):
    return sum(e * e for e in errors.values()) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_every_model(name, tmp_path):
    make_model(tmp_path / "model", make_config(name), torch.bfloat16)
    Truth(tmp_path, SHORT).judge(run_engine(tmp_path, SHORT))


@pytest.mark.skipif(not ON_GPU, reason="fp32 is for the CPU")
def test_fp32_is_refused(tmp_path):
    make_model(tmp_path / "model", make_config("llama"))
    with pytest.raises(EngineFailed, match="bf16") as failed:
        run_engine(tmp_path, SHORT, dtype="fp32")
    assert failed.value.code == 2


@pytest.mark.parametrize("length", [127, 4097, 70_000] if ON_GPU else [127, 1025])
def test_one_document(length, tmp_path):
    make_wide_model(tmp_path / "model")
    documents = make_documents([length], VOCABULARY)
    Truth(tmp_path, documents).judge(run_engine(tmp_path, documents, vocabulary=VOCABULARY))


def test_one_token_has_nothing_to_learn(tmp_path):
    make_wide_model(tmp_path / "model")
    run = run_engine(tmp_path, make_documents([1], VOCABULARY), vocabulary=VOCABULARY)
    assert run.loss == 0 and all((g == 0).all() for g in run.gradients.values())


def test_thousands_of_documents_in_one_micro_batch(tmp_path):
    lengths = [1, 2, 7, 16, 33, 64, 100, 127, 128, 200, 255, 256, 300, 400, 511, 1506] if ON_GPU else [1, 2, 7, 16, 33, 64, 5, 12]
    lengths = lengths * (256 if ON_GPU else 8)
    assert len(lengths) <= 4096 and sum(lengths) <= 1_000_000
    make_wide_model(tmp_path / "model")
    documents = make_documents(lengths, VOCABULARY)
    Truth(tmp_path, documents).judge(run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=len(documents)))


def test_ragged_documents_in_one_micro_batch(tmp_path):
    make_wide_model(tmp_path / "model")
    documents = make_documents([1, 127, 4097, 3000, 66_000] if ON_GPU else [1, 127, 257, 100, 500], VOCABULARY)
    Truth(tmp_path, documents).judge(run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=5))


@pytest.mark.skipif(not ON_GPU, reason="a GPU's other attention")
def test_flash_attention(tmp_path):
    make_wide_model(tmp_path / "model")
    documents = make_documents([1, 127, 4097, 3000], VOCABULARY)
    Truth(tmp_path, documents).judge(run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=4, more="attention: flash"))


@pytest.mark.parametrize("name, sequence", [("llama", 2), ("llama_mqa", 2), ("llama", 1)])
def test_two_ranks(name, sequence, tmp_path):
    """Two ranks, on one GPU: one sequence shared by both (also one key-value head for two ranks), or two replicas."""
    make_model(tmp_path / "model", make_config(name), torch.bfloat16)
    truth = Truth(tmp_path, SHORT)
    one = run_engine(tmp_path, SHORT, name="one")
    two = run_engine(tmp_path, SHORT, name="two", ranks=2, sequence=sequence)
    truth.judge(two)
    truth.judge_alike(two, one)


def test_two_ranks_share_long_and_packed_documents(tmp_path):
    make_wide_model(tmp_path / "model")
    documents = make_documents([4097, 1, 1000, 127, 3001] if ON_GPU else [257, 1, 100, 27], VOCABULARY)
    truth = Truth(tmp_path, documents)
    one = run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=len(documents), name="one")
    two = run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=len(documents), name="two", ranks=2, sequence=2)
    truth.judge(two)
    truth.judge_alike(two, one)


def test_twenty_steps(tmp_path):
    """The losses of twenty updates: no further from fp32 than twice Transformers' in bf16, and those of the CPU engine."""
    make_model(tmp_path / "model", make_config("llama"), torch.bfloat16)
    true, bf16 = ([row["loss"] for row in run_transformers(tmp_path, SHORT, 20, dtype, DEVICE, attention)[0]] for dtype, attention in ((torch.float32, "repeated"), (torch.bfloat16, "sdpa")))
    gpu = [row["loss"] for row in run_engine(tmp_path, SHORT, steps=20).rows]
    cpu = [row["loss"] for row in run_engine(tmp_path, SHORT, steps=20, device="cpu", name="cpu").rows]

    def apart(a, b):
        return statistics.mean((x - y) ** 2 for x, y in zip(a, b)) ** 0.5

    assert true[-1] < 0.8 * true[0]  # it learns
    limit = max(2 * apart(bf16, true), 2e-3 * true[0])
    if ON_GPU:
        split = [row["loss"] for row in run_engine(tmp_path, SHORT, steps=20, memory="16GiB, master_weights: split", name="split").rows]
        assert apart(split, gpu) <= limit and split[0] == pytest.approx(gpu[0], rel=1e-5), (split, gpu)
    print(f"apart: engine and fp32 {apart(gpu, true):.3g}, CPU engine and fp32 {apart(cpu, true):.3g}, both engines {apart(gpu, cpu):.3g}, Transformers bf16 and fp32 {apart(bf16, true):.3g}; loss {true[0]:.3g} to {true[-1]:.3g}")
    assert apart(gpu, true) <= limit and apart(cpu, true) <= limit and apart(gpu, cpu) <= limit, (apart(gpu, true), apart(cpu, true), apart(gpu, cpu), apart(bf16, true))


@pytest.mark.parametrize("heads", [(8, 2), (8, 1), (4, 4)], ids=["gqa", "mqa", "mha"])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_head_sizes(head_size, heads, tmp_path):
    make_wide_model(tmp_path / "model", heads, head_size)
    documents = make_documents([300, 77, 129], VOCABULARY)
    Truth(tmp_path, documents).judge(run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=3))


@pytest.mark.parametrize("lengths", [[20_000], [3000, 1, 500, 127] * 4] if ON_GPU else [[1500], [300, 1, 50, 127]], ids=["long", "packed"])
def test_deterministic_runs_are_equal_bit_for_bit(lengths, tmp_path):
    """Gradients of the second step too: they hang on the first update."""
    make_wide_model(tmp_path / "model")
    documents = make_documents(lengths, VOCABULARY)
    once, again = (run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=len(documents), steps=2, name=name, more=DETERMINISTIC) for name in ("once", "again"))
    for step in (1, 2):
        assert (once.dump / f"step_{step}.safetensors").read_bytes() == (again.dump / f"step_{step}.safetensors").read_bytes()
    assert [r["loss"] for r in once.rows] == [r["loss"] for r in again.rows]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_changed_token_changes_no_bit_of_another_document(ranks, tmp_path):
    """Only the third document is trained: loss and gradients are its own, whatever stands in those beside it."""
    make_wide_model(tmp_path / "model")
    lengths = [3000, 127, 4096, 500] if ON_GPU else [300, 27, 410, 50]
    documents = make_documents(lengths, VOCABULARY, untrained=(0, 1, 3))

    def run(name, documents):
        return run_engine(tmp_path, documents, vocabulary=VOCABULARY, micro_batch=len(documents), steps=1, ranks=ranks, sequence=ranks, name=name, more=DETERMINISTIC)

    before = run("before", documents)
    gradients = (before.dump / "step_1.safetensors").read_bytes()
    assert before.rows[0]["loss"] > 0
    for changed in (0, 1, 3, 2):
        ids, trained = documents[changed]
        ids = ids.copy()
        ids[5] = (ids[5] + 1) % VOCABULARY
        other = [*documents[:changed], (ids, trained), *documents[changed + 1:]]
        after = run(f"changed_{changed}", other)
        same = (after.dump / "step_1.safetensors").read_bytes() == gradients and after.rows[0]["loss"] == before.rows[0]["loss"]
        assert same == (changed != 2), f"document {changed}"


def kept_line(run):
    return re.search(r"^kept +(.*)$", run.said, re.MULTILINE)[1]


def planned_mib(run):
    number, unit = re.search(r"^memory +([\d.]+) (KiB|MiB|GiB)", run.said, re.MULTILINE).groups()
    return float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]


def test_what_is_kept_does_not_change_what_is_computed(tmp_path):
    """Less and less memory, until it does not fit: less is kept, more is computed again, with the same result."""
    make_wide_model(tmp_path / "model", layers=4)
    documents = make_documents([65_536 if ON_GPU else 2000], VOCABULARY)
    most = run_engine(tmp_path, documents, vocabulary=VOCABULARY, more=DETERMINISTIC, name="most")
    seen, enough = {kept_line(most)}, planned_mib(most)
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5) if ON_GPU else (1.2, 1.1, 1.0, 0.9):
        try:
            less = run_engine(tmp_path, documents, vocabulary=VOCABULARY, memory=f"{int(share * enough * 1024)}KiB", more=DETERMINISTIC, name=f"share_{share}")
        except EngineFailed as failed:
            assert failed.code == 3, failed
            break
        seen.add(kept_line(less))
        print(f"{share}: {kept_line(less)}")
        apart = total({k: sides.relative(g, most.gradients[k]) for k, g in less.gradients.items()})
        assert apart == 0, (share, kept_line(less), apart)
        assert less.loss == pytest.approx(most.loss, rel=1e-4)
    assert len(seen) >= 3, seen
