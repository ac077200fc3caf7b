"""A private Slurm for the tests: munged, slurmctld, and a slurmd on each of several machines (machines.py).

Nothing under /etc, /run or /var is used. Packages: apt-get install --no-install-recommends slurm-wlm munge.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machines
from machines import HUB, Machines

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scontrol", "scancel")
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_FIT = ("idle", "mixed", "allocated", "completing")

# cred_expire is also the time before a requeued job may start again (120 s by default). Slurm gives up a node that does
# not answer after SlurmdTimeout (300 s by default). CPUs, memory and GPUs are fake; the GPUs are /dev/null.
_SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={hub}({hub_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmdTimeout=10
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
_NUM_GPUS = 8

# Production tracks processes with cgroups: a signal that srun passes on reaches only a task's first process, not its
# children. (linuxproc signals them all: tests pass, and production loses the checkpoint.) A cgroup namespace keeps
# clusters on one host apart.
_IN_A_CGROUP = """
d=/sys/fs/cgroup/freezer
mount -t tmpfs t /sys/fs/cgroup; mkdir -p $d; mount -t cgroup -o freezer f $d
mkdir -p $d/$1; echo 0 > $d/$1/tasks; umount $d; shift
exec unshare --cgroup sh -ec 'mount -t cgroup -o freezer f /sys/fs/cgroup/freezer; exec "$@"' sh "$@"
"""
_REMOVE_CGROUPS = """
mount -t tmpfs t /mnt; mkdir /mnt/f; mount -t cgroup -o freezer f /mnt/f
for i in 1 2 3 4 5 6 7 8 9 10; do
  find /mnt/f -depth -mindepth 1 -path "/mnt/f/$1*" -type d -exec rmdir {} + 2>/dev/null && break; sleep 0.1
done
"""
_CAN_FREEZE = "mount -t tmpfs t /mnt; mkdir /mnt/f; mount -t cgroup -o freezer f /mnt/f; test -w /mnt/f/tasks"
_PRIVATELY = ("unshare", "-m", "--propagation", "private", "sh", "-ec")


def missing() -> str | None:
    """Return why no cluster can run here, or None."""
    for program in _PROGRAMS:
        if not shutil.which(program, path=_PATH):
            return f"{program} is not installed (apt-get install --no-install-recommends slurm-wlm munge)"
    return machines.missing()


class Cluster:
    """Context manager. The controller runs on the hub, and so do the commands.

    Args:
        folder: Folder of the daemons' files, on all machines.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.machines = Machines(self.folder)
        self._conf = self.folder / "slurm.conf"
        can_freeze = subprocess.run([*_PRIVATELY, _CAN_FREEZE], capture_output=True, check=False).returncode == 0
        self._tracking = "cgroup" if can_freeze else "pgid"

    def __enter__(self) -> Cluster:
        for name in ("munge", "state", "spool", "log", "gpus"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        self.machines.__enter__()
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_daemons(self) -> None:
        munge = self.folder / "munge"
        munge.chmod(0o711)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "munge.sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._start_daemon(HUB, "munged", "--foreground", "--force", *options)
        _wait_until((munge / "munge.sock").exists, 60, "munged does not answer")
        self._start_daemon(HUB, "slurmctld", "-D", "-f", self._conf)
        for name in self.machines.names:
            self.start_slurmd(name)
        self.wait_for_nodes()

    def start_slurmd(self, name: str) -> None:
        """Start slurmd, also after a crashed machine was booted again."""
        wrapper = ["sh", "-ec", _IN_A_CGROUP, "sh", self._cgroup(name)] if self._tracking == "cgroup" else []
        self._start_daemon(name, "slurmd", "-D", "-N", name, "-f", self._conf, wrapper=wrapper)

    def _cgroup(self, name: str) -> str:
        return f"slurm-test-{self.machines.init[HUB]}-{name}"

    def _start_daemon(self, machine: str, program: str, *options: object, wrapper: Sequence[str] = ()) -> None:
        path = shutil.which(program, path=_PATH)
        with (self.folder / "log" / f"{program}-{machine}.out").open("ab") as log:
            self.machines.start(
                machine,
                [*wrapper, path, *options],
                cwd=self.folder,
                env=self._environment({}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _write_configuration(self) -> None:
        names = self.machines.names
        gpus = self.folder / "gpus"
        for number in range(_NUM_GPUS):
            (gpus / f"gpu{number}").symlink_to("/dev/null")
        nodes = [
            f"NodeName={name} NodeAddr={self.machines.address[name]} CPUs=8 RealMemory=64000 Gres=gpu:{_NUM_GPUS}"
            for name in names
        ]
        hub_address = self.machines.address[HUB]
        self._conf.write_text(
            _SLURM_CONF.format(
                hub=HUB, hub_address=hub_address, folder=self.folder, tracking=self._tracking, nodes="\n".join(nodes)
            )
        )
        lines = [f"NodeName={name} Name=gpu File={gpus}/gpu[0-{_NUM_GPUS - 1}]" for name in names]
        (self.folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))
        # Where slurmd cannot detect the version, it does not start without this. Only the freezer is used.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    @contextmanager
    def configured_without(self, text: str) -> Iterator[None]:
        """Remove the text from slurm.conf within the block."""
        before = self._conf.read_text()
        assert text in before
        try:
            self._conf.write_text(before.replace(text, ""))
            self.run("scontrol", "reconfigure")
            yield
        finally:
            self._conf.write_text(before)
            self.run("scontrol", "reconfigure")

    def wait_for_nodes(self, *, idle: bool = True) -> None:
        """Wait until all nodes are up and idle."""

        def ready() -> bool:
            lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
            fit = ("idle",) if idle else _FIT
            return len(lines) == len(self.machines.names) and all(line in fit for line in lines)

        _wait_until(ready, 300, "nodes are not ready")

    def wait_until_gone(self, name: str, number: int) -> None:
        """Wait until nothing of a job is left on this node; a node that still has a job refuses its next start."""
        pattern = rf"slurmstepd: \[{number}\."
        _wait_until(lambda: not self.machines.pids(name, pattern), 300, f"job {number} is still on {name}")

    @contextmanager
    def without_node(self, name: str) -> Iterator[None]:
        """Start no job on this node within the block.

        A node that has come back may still follow an earlier order to end a job. It then refuses the next start of that
        job, and Slurm holds it.
        """
        self.run("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")
        try:
            yield
        finally:
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def resume_drained_nodes(self) -> None:
        """Resume drained nodes; Slurm drains a node whose slurmd reports another state than the controller has."""
        for line in self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout.splitlines():
            name, state = line.split()
            if "drain" in state:
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def __exit__(self, *_: object) -> None:
        cgroup = self._cgroup("") if self._tracking == "cgroup" and HUB in self.machines.init else None
        self.machines.__exit__()
        if cgroup:
            subprocess.run([*_PRIVATELY, _REMOVE_CGROUPS, "sh", cgroup], capture_output=True, check=False)

    # ---- jobs ----

    def _environment(self, base: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in (base or os.environ).items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**kept, "SLURM_CONF": str(self._conf)}

    def run(
        self, *command: object, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the machine of the controller."""
        return self.machines.run(HUB, command, env=self._environment(environment or {}), **options)

    def submit(self, *arguments: object, cwd: Path, environment: Mapping[str, str] | None = None) -> int:
        """Run sbatch and return the number of the job."""
        done = self.run("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment)
        return int(done.stdout.strip().split(";")[0])

    def job(self, number: object) -> dict[str, str]:
        """Return Slurm's record of a job."""
        line = self.run("scontrol", "-o", "show", "job", number).stdout.splitlines()[0]
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def wait_for_job(self, number: object, *, states: Sequence[str] = _ENDED, timeout: float) -> dict[str, str]:
        """Wait until the job is in one of the states, by default until it has ended."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is still {job['JobState']} ({job.get('Reason')})"
            time.sleep(0.2)
        return job


def _wait_until(condition: Any, seconds: float, error: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, error
        time.sleep(0.05)
