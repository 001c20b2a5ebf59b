"""tools/check_floors.py: what it takes and what it refuses, and that the tree passes."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("check_floors", ROOT / "tools" / "check_floors.py")
check_floors = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_floors)


def test_the_tree_includes_only_downward():
    assert check_floors.offences(ROOT / "src") == []


@pytest.mark.parametrize("name, include", [
    ("step/a.cc", '"ops/ops.h"'),
    ("step/a.cc", '"step/b.h"'),
    ("comm/a.cc", '"ops/ops.h"'),
    ("comm/a.cc", "<torch/csrc/distributed/c10d/Store.hpp>"),
    ("engine/a.cc", "<ATen/ops/mm.h>"),
    ("kernels/a.cu", "<cuda_runtime.h>"),
    ("cli/engine_main.cc", '"train/train.h"'),
    ("cli/main.cc", '"plan/plan.h"'),
    ("cli/export.cc", '"kernels/bf16.h"'),
    ("base/a.cc", "<vector>"),
])
def test_takes_what_lies_below(name, include):
    assert list(check_floors.offences_of(name, f"#pragma once\n#include {include}\n")) == []


@pytest.mark.parametrize("name, include, said", [
    ("base/a.h", '"recipe/recipe.h"', "recipe does not lie below base"),
    ("recipe/a.h", '"models/spec.h"', "models does not lie below recipe"),
    ("step/a.h", '"data/batch.h"', "data does not lie below step"),
    ("engine/a.cc", '"train/train.h"', "train does not lie below engine"),
    ("ops/a.h", '"comm/group.h"', "ops is of the paper wing, comm of the metal wing"),
    ("plan/a.cc", '"engine/engine.h"', "plan is of the paper wing"),
    ("cli/main.cc", '"train/train.h"', "cli is of the paper wing"),
    ("launch/a.cc", '"models/spec.h"', "models does not lie below launch"),
    ("plan/a.cc", "<ATen/ATen.h>", "plan knows no torch"),
    ("kernels/a.cu", "<c10/core/ScalarType.h>", "kernels knows no torch"),
    ("step/a.cc", "<cuda_runtime.h>", "step knows no CUDA"),
    ("helpers/a.cc", "<vector>", "the folder 'helpers' has no floor"),
])
def test_refuses_what_does_not(name, include, said):
    found = list(check_floors.offences_of(name, f"// a\n#include {include}\n"))
    assert len(found) == 1 and said in found[0], found
