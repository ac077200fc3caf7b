"""Ranks and restarts, read from the launcher's environment variables without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reid.errors import WorldError

_TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# One task for each rank, as `srun python launch/train.py` starts them. In a batch script there is no step.
_SRUN_NAMES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST")
# Numbers of processes that other launchers started. SLURM_STEP_NUM_TASKS is 1 in a batch script, more under srun.
_COUNT_NAMES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class World:
    """Rank of this process among all that train together."""

    rank: int = 0
    local_rank: int = 0
    num_ranks: int = 1
    has_group: bool = False  # under torchrun or accelerate's launcher (even with one process), or in a Slurm step
    by_srun: bool = False  # ranks are the tasks of a Slurm step


def read_world(environment: Mapping[str, str]) -> World:
    """Read the rank that torchrun, accelerate's launcher on top of it, or srun wrote into the environment.

    Raises:
        WorldError: Several processes were started without a way to connect to each other, or a variable is invalid.
    """
    missing = [name for name in _TORCHRUN_NAMES if not environment.get(name)]
    if not missing:
        return _world(environment, _TORCHRUN_NAMES[:3])
    if _is_srun_task(environment) and missing[:3] == list(_TORCHRUN_NAMES[:3]):
        return _world(environment, _SRUN_NAMES[:3], by_srun=True)
    for name in _COUNT_NAMES:
        if environment.get(name) and _integer(environment, name) > 1:
            raise WorldError(
                f"{', '.join(missing)} must be set, because {name} announces {environment[name]} processes, which "
                "would train alone. Fix: start one torchrun on every node (torchrun --nproc_per_node=N launch/train.py "
                f"...), or unset {name} to train in a single process.",
                key=name,
            )
    return World()


def _is_srun_task(environment: Mapping[str, str]) -> bool:
    names = ("SLURM_JOB_ID", *_SRUN_NAMES)
    return all(environment.get(name) for name in names) and _integer(environment, "SLURM_STEP_NUM_TASKS") > 1


def _world(environment: Mapping[str, str], names: tuple[str, str, str], *, by_srun: bool = False) -> World:
    rank_name, local_name, count_name = names
    rank, local_rank, num_ranks = (_integer(environment, name) for name in names)
    if max(rank, local_rank) >= num_ranks:
        launcher = "srun" if by_srun else "torchrun"
        raise WorldError(
            f"{rank_name} and {local_name} must be below {count_name}, got {rank} and {local_rank} of {num_ranks}. "
            f"Fix: let {launcher} set them.",
            key=rank_name if rank >= num_ranks else local_name,
        )
    return World(rank, local_rank, num_ranks, has_group=True, by_srun=by_srun)


def reports_for_node(environment: Mapping[str, str]) -> bool:
    """Return whether this process reports the errors that all processes of its node have before they are connected."""
    return environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")) == "0"


@dataclass(frozen=True)
class Start:
    """Start of a job, as far as a launcher counts the starts."""

    job: str = ""  # Slurm's job, or torchrun's rendezvous; empty if no launcher counts
    restart: int = 0  # number of times that Slurm has requeued the job
    rendezvous: str = ""  # torchrun's, which forms a new group only after it gave up the last one

    def precedes(self, other: Start) -> bool:
        """Return whether the launcher gave up this start for the other one."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart

    def replaces(self, other: Start) -> bool:
        """Return whether the launcher gave up the other start for this one."""
        is_regrouped = bool(self.rendezvous) and (self.job, self.rendezvous) == (other.job, other.rendezvous)
        return other.precedes(self) or (is_regrouped and self.restart == other.restart)


def read_start(environment: Mapping[str, str]) -> Start:
    """Read the start of this process from the variables of Slurm and torchrun."""
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
            f"the environment variable {name} must be an integer, got {environment[name]!r}. Fix: unset it.", key=name
        )
    return int(environment[name])


_JOB_NAMES = ("JOB_ID", "JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST")


def slurm_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return Slurm's description of the job, for the run's records; empty without Slurm."""
    return {name.lower(): value for name in _JOB_NAMES if (value := environment.get(f"SLURM_{name}"))}
