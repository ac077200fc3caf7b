"""What the launcher told this process about ranks; read without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reid.errors import WorldError

_TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How other launchers say how many processes they started. SLURM_STEP_NUM_TASKS is 1 in a batch script, more under srun.
_COUNT_NAMES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

HIDDEN = "REID_"  # before the names of variables that are taken away from libraries


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int = 0
    local_rank: int = 0
    num_ranks: int = 1
    has_group: bool = False  # under torchrun or accelerate's launcher, be it with one process


def read_world(environment: Mapping[str, str]) -> World:
    """The ranks that torchrun, or accelerate's launcher on top of it, wrote into the environment.

    Raises:
        WorldError: several processes were started, but not in a way that lets them find each other; or what is written
            there makes no sense.
    """
    missing = [name for name in _TORCHRUN_NAMES if not environment.get(name)]
    if not missing:
        rank, local_rank, num_ranks = (_integer(environment, name) for name in _TORCHRUN_NAMES[:3])
        if max(rank, local_rank) >= num_ranks:
            raise WorldError(
                f"RANK and LOCAL_RANK must be below WORLD_SIZE, got {rank} and {local_rank} of {num_ranks}; let "
                "torchrun set them"
            )
        return World(rank, local_rank, num_ranks, has_group=True)
    for name in _COUNT_NAMES:
        if environment.get(name) and _integer(environment, name) > 1:
            raise WorldError(
                f"{name} says that {environment[name]} processes were started, but {', '.join(missing)} is not set, so "
                "each would train alone, side by side; start one torchrun on every node (torchrun --nproc_per_node=N "
                f"launch/train.py ...), or unset {name} to train in a single process"
            )
    return World()


def _integer(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise WorldError(f"the environment variable {name} must be a whole number, got {environment[name]!r}; unset it")
    return int(environment[name])


_JOB_NAMES = ("JOB_ID", "JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST")


def slurm_job(environment: Mapping[str, str]) -> dict[str, str]:
    """What Slurm said of the job, to find it again; empty without Slurm."""
    found = {name: environment.get(f"{HIDDEN}SLURM_{name}", environment.get(f"SLURM_{name}")) for name in _JOB_NAMES}
    return {name.lower(): value for name, value in found.items() if value}
