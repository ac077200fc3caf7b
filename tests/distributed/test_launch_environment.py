"""Launchers' environment variables: ranks, starts, and combinations that are rejected."""

import pytest
from refusals import refused

from reid.distributed.launch_environment import Start, World, read_start, read_world, reports_for_node
from reid.errors import WorldError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
# One task of each node of a job of two nodes, as `srun torchrun` leaves it to torchrun's processes.
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_a_single_process_needs_no_launcher():
    assert read_world({"HOME": "/root"}) == World(rank=0, local_rank=0, num_ranks=1, has_group=False)


def test_torchruns_ranks_are_read():
    assert read_world(TORCHRUN) == World(rank=3, local_rank=1, num_ranks=4, has_group=True)


def test_torchrun_with_one_process_still_has_a_group():
    single = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert read_world(single) == World(rank=0, local_rank=0, num_ranks=1, has_group=True)


def test_torchrun_counts_and_not_the_slurm_step_around_it():
    assert read_world(TORCHRUN | SLURM) == World(rank=3, local_rank=1, num_ranks=4, has_group=True)


def test_the_tasks_of_a_slurm_step_are_ranks():
    assert read_world(SLURM) == World(rank=1, local_rank=0, num_ranks=2, has_group=True, by_srun=True)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_many_processes_that_cannot_find_each_other_are_rejected(name):
    with refused(WorldError, name, "2 processes", "RANK, LOCAL_RANK", "torchrun --nproc_per_node=N", f"unset {name}"):
        read_world({name: "2"})


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_torchrun_variables_are_rejected_by_name(missing):
    with refused(WorldError, "WORLD_SIZE", f"{missing} must be set"):
        read_world({name: value for name, value in TORCHRUN.items() if name != missing})


def test_batch_script_of_multi_task_job_is_a_single_process():
    assert read_world({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == World()


@pytest.mark.parametrize("value", ["two", "-1", "1.0"])
def test_a_number_that_is_none_is_rejected(value):
    with refused(WorldError, "WORLD_SIZE", f"got {value!r}"):
        read_world(TORCHRUN | {"WORLD_SIZE": value})


@pytest.mark.parametrize(
    ("ranks", "key"), [({"RANK": "4"}, "RANK"), ({"LOCAL_RANK": "4"}, "LOCAL_RANK"), ({"WORLD_SIZE": "0"}, "RANK")]
)
def test_ranks_outside_the_world_are_rejected(ranks, key):
    with refused(WorldError, key, "WORLD_SIZE"):
        read_world(TORCHRUN | ranks)


def test_tasks_outside_the_slurm_step_are_rejected():
    with refused(WorldError, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "2 and 0 of 2"):
        read_world(SLURM | {"SLURM_PROCID": "2"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_slurm_step_with_some_torchrun_variables_is_rejected(name):
    with refused(WorldError, "SLURM_STEP_NUM_TASKS", "2 processes"):
        read_world(SLURM | {name: "1"})


@pytest.mark.parametrize(
    ("environment", "is_reporter"),
    [
        ({}, True),
        (TORCHRUN, False),
        (TORCHRUN | {"LOCAL_RANK": "0", "SLURM_LOCALID": "1"}, True),
        (SLURM, True),
        (SLURM | {"SLURM_LOCALID": "1"}, False),
    ],
)
def test_one_process_per_node_reports_errors(environment, is_reporter):
    assert reports_for_node(environment) == is_reporter


# ---- which start of which job ----


def test_starts_are_read_of_slurm_and_of_torchrun():
    assert read_start({}) == Start()
    assert read_start({"TORCHELASTIC_RUN_ID": "none"}) == Start()
    assert read_start({"TORCHELASTIC_RUN_ID": "a"}) == Start("a", 0, "a")
    assert read_start(SLURM) == Start("7", 0, "")
    requeued = {"SLURM_RESTART_COUNT": "3", "TORCHELASTIC_RUN_ID": "7-3"}
    assert read_start(SLURM | requeued) == Start("7", 3, "7-3")


@pytest.mark.parametrize(
    ("start", "former", "order"),
    [
        (Start("7", 1, "7-1"), Start("7", 0, "7-0"), "replaces"),  # requeued
        (Start("7", 0, "7-0"), Start("7", 1, "7-1"), "precedes"),
        (Start("7", 0, "7-0"), Start("7", 0, "7-0"), "replaces"),  # torchrun's next group
        (Start("a", 0, "a"), Start("a", 0, "a"), "replaces"),
        (Start("7", 0, ""), Start("7", 0, ""), None),  # twice srun in one job
        (Start("7", 0, "x"), Start("7", 0, "y"), None),  # twice torchrun in one job
        (Start("8", 1, "8-1"), Start("7", 0, "7-0"), None),  # another job
        (Start("", 0, ""), Start("", 0, ""), None),  # no launcher counts
        (Start("7", 1, "7-1"), Start("", 0, ""), None),
    ],
)
def test_only_an_earlier_start_of_the_same_job_is_replaced(start, former, order):
    assert start.replaces(former) == (order == "replaces")
    assert start.precedes(former) == (order == "precedes")
