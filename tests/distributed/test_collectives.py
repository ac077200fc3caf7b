"""N processes = 1 process, in float64, with one launch per number of ranks; see distributed_checks.py.

Also covers reid.training.criterion, reid.training.schedule, reid.evaluation.evaluator, reid.distributed.session,
reid.distributed.sync_batchnorm.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_checks import (
    EQUAL_COUNTS,
    EQUAL_VARIANTS,
    EVALUATION_SIZES,
    VARIANTS,
    compare_ranks,
    compare_recorded,
)
from program import same

from reid.distributed import session

HERE = Path(__file__).parents[1]
CASES = [*(("unequal", name) for name in VARIANTS), *(("equal", name) for name in EQUAL_COUNTS)]


def ranks(*numbers: int) -> list[Any]:
    """Return parameters with the numbers of ranks; more than two are slow on two cores."""
    return [pytest.param(number, marks=[pytest.mark.slow] if number > 2 else []) for number in numbers]


@pytest.fixture(scope="module")
def launch(place, tmp_path_factory):
    """Return a function of work and number of ranks that returns what each rank saved; a launch runs once."""

    @cache
    def run(work: Callable[[Path], int], num_ranks: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        ended = place.fork(partial(work, folder), num_ranks=num_ranks).ended()
        assert [rank.code for rank in ended] == [0] * num_ranks, ended
        return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(num_ranks)]

    return run


@pytest.fixture(scope="module")
def outcomes(launch):
    """Return a function of the number of ranks that returns the outcome of each rank."""
    return partial(launch, compare_ranks)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], floor: float = 1e-9) -> float:
    """Return the largest difference of two state dicts, relative to the entry's largest value or `floor`."""
    assert one.keys() == other.keys()
    return max(
        float((one[name].double() - other[name].double()).abs().max() / one[name].double().abs().max().clamp(min=floor))
        for name in one
    )


def largest_difference_of_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference, with a floor for biases before a BatchNorm, whose gradients are rounding."""
    return largest_difference(one, other, floor=1e-3 * max(float(gradient.abs().max()) for gradient in one.values()))


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("adam_center", 2),
        pytest.param("adam_center", 1, marks=pytest.mark.slow),
        pytest.param("sgd", 1, marks=pytest.mark.slow),
        pytest.param("sgd", 2, marks=pytest.mark.slow),
    ],
)
def test_ten_steps_are_those_recorded_of_reid_strong_baseline(launch, name, num_ranks):
    golden = np.load(HERE / "golden" / f"trajectory_{name}.npz")
    outcome = launch(partial(compare_recorded, name), num_ranks)[0]
    np.testing.assert_allclose(outcome["logged"]["lr"], golden["lr"], rtol=1e-12)
    np.testing.assert_allclose(outcome["logged"]["loss"], golden["loss"], rtol=1e-6)
    np.testing.assert_allclose(outcome["logged"]["acc"], golden["acc"], rtol=1e-12)
    np.testing.assert_allclose(outcome["probe_feats"], golden["probe_feats"], atol=1e-6)
    if name == "adam_center":
        np.testing.assert_allclose(outcome["centers"], golden["final_centers"], atol=1e-6)


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
@pytest.mark.parametrize(("counts", "name"), CASES)
def test_training_does_not_depend_on_the_number_of_ranks(outcomes, name, counts, num_ranks):
    alone, shared = outcomes(1)[0][counts][name], outcomes(num_ranks)[0][counts][name]
    assert shared["batches"] == alone["batches"]
    assert shared["pixels"] == alone["pixels"]
    for term, values in alone["logged"].items():
        np.testing.assert_allclose(shared["logged"][term], values, rtol=1e-9, err_msg=term)
    assert largest_difference_of_gradients(alone["gradients"], shared["gradients"]) < 1e-9
    assert largest_difference(alone["state"], shared["state"]) < 1e-9


@pytest.mark.parametrize("num_ranks", ranks(1, 2, 4))
@pytest.mark.parametrize(("counts", "name"), [case for case in CASES if case[1] in EQUAL_VARIANTS])
def test_gradient_of_micro_batches_equals_that_of_global_batch(outcomes, name, counts, num_ranks):
    at_once, in_parts = (outcomes(num_ranks)[0][counts][which] for which in (EQUAL_VARIANTS[name], name))
    np.testing.assert_allclose(in_parts["logged"]["loss"], at_once["logged"]["loss"], rtol=1e-9)
    assert largest_difference_of_gradients(at_once["gradients"], in_parts["gradients"]) < 1e-9
    assert largest_difference(at_once["state"], in_parts["state"]) < 1e-9


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
@pytest.mark.parametrize("name", ["softmax_triplet_center", "clipped", "accumulated"])
def test_sharding_changes_nothing(outcomes, name, num_ranks):
    """Run accelerate's FSDP2 over gloo."""
    alone, sharded = outcomes(1)[0]["unequal"][name], outcomes(num_ranks)[0]["sharded"][name]
    assert sharded["is_sharded"]
    np.testing.assert_allclose(sharded["logged"]["loss"], alone["logged"]["loss"], rtol=1e-9)
    assert largest_difference_of_gradients(alone["gradients"], sharded["gradients"]) < 1e-9
    assert largest_difference(alone["state"], sharded["state"]) < 1e-9


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
def test_evaluation_of_a_sharded_model_is_the_same(outcomes, num_ranks):
    """Include ranks without a batch, for which the other ranks would wait if they needed their shards."""
    alone, sharded = outcomes(1)[0]["evaluation"], outcomes(num_ranks)[0]["sharded evaluation"]
    for num_images in EVALUATION_SIZES:
        assert sharded[num_images]["summary"] == alone[num_images]["summary"]


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
def test_checkpoints_fit_sharded_and_plain_models_alike(outcomes, num_ranks):
    moved = outcomes(num_ranks)[0]["state moved"]
    assert len(moved["first"]["optimizer"]["state"]) > 4
    assert same(moved["received"], moved["first"])
    assert (
        largest_difference(moved["after"]["model"], moved["after_received"]["model"]) < 1e-12
    )  # gloo sums in any order
    assert not same(moved["after"], moved["first"])
    assert largest_difference(moved["after"]["model"], moved["after_plain"]["model"]) < 1e-9


def test_clipping_makes_the_gradient_as_small_as_asked(outcomes):
    plain, clipped = (outcomes(1)[0]["equal"][name]["gradients"] for name in ("softmax_triplet", "clipped"))
    norms = [
        float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        for gradients in (plain, clipped)
    ]
    assert norms[0] > 0.5
    assert norms[1] == pytest.approx(0.5, rel=1e-4)  # torch divides by the norm plus 1e-6


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
def test_all_ranks_hold_the_same_weights(outcomes, num_ranks):
    first, *others = (outcome["unequal"]["softmax_triplet_center"]["state"] for outcome in outcomes(num_ranks))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
@pytest.mark.parametrize("wrong", ["without SyncBN", "without gather"])
def test_the_equality_would_notice_a_wrong_way(outcomes, wrong, num_ranks):
    alone = outcomes(1)[0]["unequal"]["softmax_triplet"]["state"]
    assert largest_difference(alone, outcomes(num_ranks)[0]["wrong"][wrong]["state"]) > 1e-6
    assert largest_difference(alone, outcomes(1)[0]["wrong"][wrong]["state"]) == 0  # one process needs neither


@pytest.mark.parametrize("num_ranks", ranks(1, 2, 3, 4))
@pytest.mark.parametrize("num_images", EVALUATION_SIZES)
def test_evaluation_does_not_depend_on_the_number_of_ranks(outcomes, num_images, num_ranks):
    alone = outcomes(1)[0]["evaluation"][num_images]
    assert {"TPR@FPR=0.01", "TPR@FPR=0.3"} < alone["summary"]["plain"].keys()
    for outcome in outcomes(num_ranks):
        assert outcome["evaluation"][num_images]["summary"] == alone["summary"]
        for name in alone.keys() - {"summary"}:
            np.testing.assert_array_equal(outcome["evaluation"][num_images][name], alone[name])


@pytest.mark.parametrize("num_ranks", ranks(1, 2, 3, 4))
def test_rows_come_back_in_order_from_ranks_with_unequal_numbers(outcomes, num_ranks):
    for outcome in outcomes(num_ranks):
        assert outcome["rows"]["rows"].tolist() == [[10.0 * i, 100.0 * i] for i in range(11)]


@pytest.mark.parametrize("num_ranks", ranks(2, 3))
def test_an_error_on_one_rank_is_raised_on_all(outcomes, num_ranks):
    assert outcomes(num_ranks)[0]["errors"] == [{"shared": f"no such folder (on rank {num_ranks - 1})"}] * num_ranks


@pytest.mark.parametrize("num_ranks", ranks(2, 3))
def test_ranks_that_disagree_do_not_start(outcomes, num_ranks):
    for outcome in outcomes(num_ranks):
        assert f"rank {num_ranks - 1} on " in outcome["disagreement"]
        assert "SOLVER.BASE_LR is 0.1, not 0.2" in outcome["disagreement"]
    assert outcomes(1)[0]["disagreement"] == "nothing"


# ---- what Ignite sees of Slurm ----

STEP_IN_A_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "n1",
}


@pytest.mark.parametrize(
    ("by_srun", "seen"),
    [
        (False, {"SLURM_JOB_ID": None, "SLURM_NTASKS": "4"}),
        (True, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}),
    ],
)
def test_only_ignite_sees_adjusted_slurm_environment(monkeypatch, by_srun, seen):
    for name, value in STEP_IN_A_JOB.items():
        monkeypatch.setenv(name, value)
    with session._slurm_variables_for_ignite(by_srun=by_srun):
        assert {name: os.environ.get(name) for name in seen} == seen
        os.environ["RANK"] = "1"  # which Ignite sets, and must stay
    assert {name: os.environ.get(name) for name in STEP_IN_A_JOB} == STEP_IN_A_JOB
    assert os.environ.pop("RANK") == "1"
