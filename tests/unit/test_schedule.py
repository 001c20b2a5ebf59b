"""recipe::learning_rate against Transformers' schedules of the same names."""

import json
import os
import pathlib
import subprocess

import pytest
import torch
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROBE = pathlib.Path(os.environ.get("ULYSSES_BUILD", ROOT / "build")) / "schedule_probe"
BASE = 3e-4
BEYOND = 5  # updates after the horizon

ARGUMENTS = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "polynomial": [{}, {"lr_end": 1e-5, "power": 2.0}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 7}],
    "cosine_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "num_cycles": 1.0}],
    "cosine_warmup_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3}],
    "warmup_stable_decay": [
        {"num_decay_steps": 10},
        {"num_decay_steps": 5, "num_stable_steps": 8, "decay_type": "1-sqrt", "warmup_type": "cosine", "min_lr_ratio": 0.2},
        {"num_decay_steps": 9, "decay_type": "linear", "warmup_type": "1-sqrt"},
    ],
}
FOLLOW_A_METRIC = {"reduce_lr_on_plateau", "greedy"}


def probe(name, arguments, ratio, horizon):
    command = [str(PROBE), name, json.dumps(arguments), str(ratio), str(BASE), str(horizon), str(horizon + BEYOND)]
    return subprocess.run(command, capture_output=True, text=True)


def reference(name, arguments, ratio, horizon):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = get_scheduler(name, optimizer, int(ratio * horizon), horizon, scheduler_specific_kwargs=arguments)
    rates = []
    for _ in range(horizon + BEYOND):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_every_name_of_transformers_is_decided():
    assert {kind.value for kind in SchedulerType} == set(ARGUMENTS) | FOLLOW_A_METRIC


@pytest.mark.parametrize("horizon", [1, 10, 37])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35])
@pytest.mark.parametrize("name,arguments", [(n, a) for n, all_of in ARGUMENTS.items() for a in all_of])
def test_rates_are_those_of_transformers(name, arguments, ratio, horizon):
    done = probe(name, arguments, ratio, horizon)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx(reference(name, arguments, ratio, horizon), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    "name,arguments,says",
    [
        ("linaer", {}, "expected one of linear, cosine"),
        ("greedy", {}, "expected one of linear, cosine"),
        ("linear", {"num_cycles": 2}, "takes no arguments, found 'num_cycles'"),
        ("cosine", {"num_cycle": 2}, "takes num_cycles, found 'num_cycle'"),
        ("cosine", {"num_cycles": "two"}, "num_cycles: expected a number"),
        ("cosine_with_min_lr", {}, "one of min_lr and min_lr_rate, found none"),
        ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0}, "found both"),
        ("polynomial", {"lr_end": 1}, "must be smaller than the learning rate"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "decay_type: expected one of"),
    ],
)
def test_a_wrong_schedule_is_refused(name, arguments, says):
    done = probe(name, arguments, 0.1, 10)
    assert done.returncode == 2
    assert says in done.stderr
