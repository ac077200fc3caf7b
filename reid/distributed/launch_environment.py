"""What the launcher told this process about ranks and restarts; read without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reid.errors import WorldError

_TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# One task for each rank, as `srun python launch/train.py` starts them. In a batch script there is no step.
_SRUN_NAMES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST")
# How other launchers say how many processes they started. SLURM_STEP_NUM_TASKS is 1 in a batch script, more under srun.
_COUNT_NAMES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int = 0
    local_rank: int = 0
    num_ranks: int = 1
    has_group: bool = False  # under torchrun or accelerate's launcher, be it with one process, or in a step of srun's
    by_srun: bool = False  # the ranks are the tasks of a Slurm step


def read_world(environment: Mapping[str, str]) -> World:
    """The ranks that torchrun, accelerate's launcher on top of it, or srun wrote into the environment.

    Raises:
        WorldError: several processes were started, but not in a way that lets them find each other; or what is written
            there makes no sense.
    """
    missing = [name for name in _TORCHRUN_NAMES if not environment.get(name)]
    if not missing:
        return _world(environment, *_TORCHRUN_NAMES[:3])
    if _is_srun_task(environment) and missing[:3] == list(_TORCHRUN_NAMES[:3]):
        return _world(environment, *_SRUN_NAMES[:3], by_srun=True)
    for name in _COUNT_NAMES:
        if environment.get(name) and _integer(environment, name) > 1:
            raise WorldError(
                f"{name} says that {environment[name]} processes were started, but {', '.join(missing)} is not set, so "
                "each would train alone, side by side; start one torchrun on every node (torchrun --nproc_per_node=N "
                f"launch/train.py ...), or unset {name} to train in a single process",
                key=name,
            )
    return World()


def _is_srun_task(environment: Mapping[str, str]) -> bool:
    names = ("SLURM_JOB_ID", *_SRUN_NAMES)
    return all(environment.get(name) for name in names) and _integer(environment, "SLURM_STEP_NUM_TASKS") > 1


def _world(
    environment: Mapping[str, str], rank_name: str, local_name: str, count_name: str, *, by_srun: bool = False
) -> World:
    names = (rank_name, local_name, count_name)
    rank, local_rank, num_ranks = (_integer(environment, name) for name in names)
    if max(rank, local_rank) >= num_ranks:
        launcher = "srun" if by_srun else "torchrun"
        raise WorldError(
            f"{rank_name} and {local_name} must be below {count_name}, got {rank} and {local_rank} of {num_ranks}; let "
            f"{launcher} set them",
            key=rank_name if rank >= num_ranks else local_name,
        )
    return World(rank, local_rank, num_ranks, has_group=True, by_srun=by_srun)


def speaks_for_node(environment: Mapping[str, str]) -> bool:
    """Whether this process tells the errors that all processes of its node have; before the world is known."""
    return environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")) == "0"


@dataclass(frozen=True)
class Start:
    """Which start of which job this is, as far as a launcher counts them."""

    job: str = ""  # Slurm's job, or torchrun's rendezvous; empty: nobody counts
    restart: int = 0  # how often Slurm has requeued the job
    rendezvous: str = ""  # of torchrun, which forms a new group only when the one before is given up

    def precedes(self, other: Start) -> bool:
        """Whether the other one was started because this one was given up."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart

    def replaces(self, other: Start) -> bool:
        """Whether this one was started because the other one was given up."""
        is_regrouped = bool(self.rendezvous) and (self.job, self.rendezvous) == (other.job, other.rendezvous)
        return other.precedes(self) or (is_regrouped and self.restart == other.restart)


def read_start(environment: Mapping[str, str]) -> Start:
    """What Slurm and torchrun tell a process of its job."""
    rendezvous = environment.get("TORCHELASTIC_RUN_ID", "")
    if rendezvous == "none":  # torchrun without --rdzv-id
        rendezvous = ""
    if not environment.get("SLURM_JOB_ID"):
        return Start(rendezvous, 0, rendezvous)
    restart = _integer(environment, "SLURM_RESTART_COUNT") if environment.get("SLURM_RESTART_COUNT") else 0
    return Start(environment["SLURM_JOB_ID"], restart, rendezvous)


def _integer(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise WorldError(
            f"the environment variable {name} must be a whole number, got {environment[name]!r}; unset it", key=name
        )
    return int(environment[name])


_JOB_NAMES = ("JOB_ID", "JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST")


def slurm_job(environment: Mapping[str, str]) -> dict[str, str]:
    """What Slurm said of the job, to find it again; empty without Slurm."""
    found = {name: environment.get(f"SLURM_{name}") for name in _JOB_NAMES}
    return {name.lower(): value for name, value in found.items() if value}
