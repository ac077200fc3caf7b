"""slurm/*.sbatch: arguments, options and environments of sbatch and what reaches the programs, on a real Slurm."""

import shlex
import sys
from pathlib import Path

import pytest
from jobs import Jobs
from program import REPOSITORY

pytestmark = pytest.mark.slow

# Fake torchrun: records its arguments and where it runs.
TORCHRUN = r"""#!/usr/bin/env bash
{
  printf '%s\0' "$(hostname)" "$SLURM_STEP_NUM_TASKS" "${CUDA_VISIBLE_DEVICES-none}" "$0" "$@"
} > "$RECORDS/$SLURM_JOB_ID.$SLURM_NODEID"
"""
CPUS = ("--gres=none", "--cpus-per-task=2", "--mem=100M")
ODD = ("SOLVER.STEPS", "[1, 2]", "WANDB.NOTES", """it's a "note": $HOME `ls` * ? \\ {} ;""", "WANDB.TAGS=['a b','c']")
# Four identities in a batch.
SETTINGS = "DATALOADER: {NUM_INSTANCE: 4}\nSOLVER: {IMS_PER_BATCH: 16}\nOUTPUT_DIR: runs/of the file\n"


class Submitted:
    """A job of a repository with the fake torchrun."""

    def __init__(self, job, records: Path):
        self.job, self._records = job, records

    def ended(self):
        assert self.job.ended() == ("COMPLETED", 0, 0), self.job.output()
        return self

    def calls(self):
        """Return for each node [host, tasks, GPUs, torchrun], the arguments of torchrun and those of the program."""
        number = self.ended().job.state()["JobId"]
        files = sorted(self._records.glob(f"{number}.*"))
        calls = [file.read_text().split("\0")[:-1] for file in files]
        starts = [call.index("launch/train.py") for call in calls]
        return [(call[:4], call[4:start], call[start + 1 :]) for call, start in zip(calls, starts, strict=True)]


@pytest.fixture(scope="module")
def submitted(slurm, place, tmp_path_factory):
    """All jobs, which run at the same time."""
    root = tmp_path_factory.mktemp("submitted from")
    repository, other, records = root / "a repository", root / "activated", root / "records"
    for folder in (repository / ".venv" / "bin", repository / "configs", other / "bin", records):
        folder.mkdir(parents=True)
    for name in ("slurm", "launch"):
        (repository / name).symlink_to(REPOSITORY / name)
    for folder in (repository / ".venv" / "bin", other / "bin"):
        (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (folder / "torchrun").write_text(TORCHRUN)
        for file in folder.iterdir():
            file.chmod(0o755)
    (repository / "configs" / "my file.yml").write_text(SETTINGS)
    config = ("--config_file", "configs/my file.yml")
    jobs = Jobs(slurm, place)

    def submit(*arguments, options=(), script="train.sbatch", **variables):
        environment = {"VENV_BIN": "", "VIRTUAL_ENV": "", "CONDA_PREFIX": "", "RECORDS": str(records), **variables}
        options = (*CPUS, *options)
        return Submitted(
            jobs.submit(script, *arguments, options=options, repository=repository, environment=environment), records
        )

    yield {
        "odd values": submit(*config, *ODD, "OUTPUT_DIR", "runs/another one"),
        "of the file": submit(*config),
        "no file": submit("--config_file", "configs/gone.yml"),
        "no option": submit("configs/my file.yml"),
        "does not fit": submit(*config, RANKS_PER_NODE="3"),
        "tasks": submit(*config, options=("--nodes=2", "--ntasks-per-node=2")),
        "too many nodes": submit(*config, options=("--nodes=2",), RANKS_PER_NODE="4"),
        "GPUs": submit(*config, options=("--nodes=2", "--gpus-per-node=2")),
        "activated": submit(*config, VIRTUAL_ENV=str(other)),
        "another activated": submit(*config, VIRTUAL_ENV=str(root)),
        "array": submit(
            *config, "OUTPUT_DIR", "runs/{} of {}", "SEED={}", script="array.sbatch", options=("--array=7",)
        ),
        "array of one": submit(*config, script="array.sbatch", options=("--array=7",)),
    }
    jobs.end()


def test_every_argument_is_passed_on_unchanged(submitted):
    ((_, _, arguments),) = submitted["odd values"].calls()
    assert arguments == ["--config_file", "configs/my file.yml", *ODD, "OUTPUT_DIR", "runs/another one"]
    assert ", OUTPUT_DIR runs/another one, no checkpoint yet\n" in submitted["odd values"].job.output()
    assert ", OUTPUT_DIR runs/of the file, no checkpoint yet\n" in submitted["of the file"].ended().job.output()


def test_array_index_is_substituted_in_every_argument(submitted):
    job = Submitted(submitted["array"].job.task(7), submitted["array"]._records)
    ((_, _, arguments),) = job.calls()
    assert arguments[2:] == ["OUTPUT_DIR", "runs/7 of 7", "SEED=7"]


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("no file", None, "error: configs/gone.yml must be a file that can be read"),
        ("no option", None, "error: configs/my file.yml must be followed by its value on the command line"),
        ("does not fit", None, "error: SOLVER.IMS_PER_BATCH=16 / DATALOADER.NUM_INSTANCE=4 must be a multiple of the"),
        ("array of one", 7, "error: one argument must contain {}, got: --config_file"),
    ],
)
def test_invalid_submission_is_one_error_line_before_any_step(submitted, name, task, message):
    job = submitted[name].job.task(task) if task else submitted[name].job
    assert job.ended() == ("FAILED", 2, 0)
    assert job.output().startswith(message)
    assert job.output().count("\n") == 1


@pytest.mark.parametrize(("name", "ranks", "gpus"), [("tasks", 1, "none"), ("GPUs", 2, "0,1")])
def test_one_torchrun_on_each_node_whatever_the_tasks(submitted, name, ranks, gpus):
    calls = submitted[name].calls()
    assert [call[0][:3] for call in calls] == [[host, "2", gpus] for host in ("n1", "n2")]
    for _, options, _ in calls:
        assert {"--nnodes=2", f"--nproc-per-node={ranks}"} < set(options)
        assert f"--rdzv-id={submitted[name].job.number}-0" in options


def test_nodes_that_cannot_share_the_batch_are_left_idle(submitted):
    """Two nodes of four ranks are too many for four identities."""
    job = submitted["too many nodes"]
    ((node, options, _),) = job.calls()
    assert {"--nnodes=1", "--nproc-per-node=4", f"--rdzv-endpoint={node[0]}:{20000 + job.job.number}"} < set(options)
    warning = "warning: the ranks of 2 nodes cannot share SOLVER.IMS_PER_BATCH=16 evenly; the training uses 1 of them\n"
    assert job.job.output().startswith(warning)


def test_the_environment_is_the_activated_one_if_it_has_torchrun(submitted):
    programs = {name: submitted[name].calls()[0][0][3] for name in ("of the file", "activated", "another activated")}
    assert programs["activated"].endswith("/activated/bin/torchrun")
    assert all(
        programs[name].endswith("/a repository/.venv/bin/torchrun") for name in ("of the file", "another activated")
    )
