"""slurm/requeue.sh: what happens to a job when its step ends, on a real Slurm with a fake torchrun.

All jobs run at the same time, because they mostly wait.
"""

import copy
import time
from pathlib import Path

import pytest
from jobs import PATIENCE
from program import REPOSITORY, names

# Fake torchrun: performs one action for each start of the job. Only the first node saves.
TORCHRUN = r"""#!/usr/bin/env bash
until [[ $1 == launch/train.py ]]; do shift; done
out=$2; shift 2; actions=("$@"); start=${SLURM_RESTART_COUNT:-0}
mkdir -p "$out/checkpoints"
save() { [[ $SLURM_NODEID != 0 ]] || touch "$out/checkpoints/last_0001_0000000$start.pt"; }
mark() { [[ $SLURM_NODEID != 0 ]] || touch "$out/PREEMPTED"; }
end() { exit 1; }
ready() { touch "$out/ready.$start.$SLURM_NODEID"; while :; do sleep 0.1; done; }
case ${actions[$start]} in
  done) save; exit 0 ;;
  fail) exit 7 ;;
  save,fail) save; exit 7 ;;
  wait,save) trap 'save; mark; end' USR1 TERM; ready ;;
  wait,slowly,save) trap 'sleep 2; save; mark; end' USR1 TERM; ready ;;
  wait,mark) trap 'mark; end' USR1 TERM; ready ;;
  wait,die) ready ;;
  until,fail) touch "$out/ready.$start.$SLURM_NODEID"; until [[ -e $out/fail ]]; do sleep 0.1; done; exit 7 ;;
esac
exit 99
"""
PYTHON = r"""#!/usr/bin/env bash
if [[ $1 == launch/plan.py ]]; then
  [[ $6 != */wrong ]] || { echo "error: KEY must be valid" >&2; exit 2; }
  printf '%s\n' "$3" "$6"
else # launch/sweep.py: an agent that gets a run at its first start and none at its second
  out=${*: -1}; start=${SLURM_RESTART_COUNT:-0}; mkdir -p "$out"; echo "$*" >> "$out/arguments"
  [[ $start == 0 ]] || exit 0
  trap 'echo saved >> "$out/arguments"; exit 0' TERM
  touch "$out/ready.0.0"; while :; do sleep 0.1; done
fi
"""
pytestmark = pytest.mark.slow

SMALL = ("--gres=none", "--cpus-per-task=1", "--mem=100M")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with the scripts and the fake programs."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "slurm").symlink_to(REPOSITORY / "slurm")
    (folder / "programs").mkdir()
    for name, text in {"torchrun": TORCHRUN, "python": PYTHON}.items():
        (folder / "programs" / name).write_text(text)
        (folder / "programs" / name).chmod(0o755)
    return folder


class FakeTraining:
    """A job whose torchrun performs one action for each start."""

    def __init__(
        self,
        jobs,
        repository: Path,
        output_dir: str,
        *actions: str,
        options=(),
        script="train.sbatch",
        programs="programs",
    ):
        self.folder = repository / "runs" / output_dir
        environment = {"VENV_BIN": programs, "SAVE_SECONDS": "20", "PROGRAM": "launch/train.py"}
        self.job = jobs.submit(
            script,
            self.folder,
            *actions,
            options=(*SMALL, *options),
            environment=environment,
            repository=repository,
        )

    def task(self, index: int):
        one = copy.copy(self)
        one.folder, one.job = self.folder.with_name(f"array_{index}"), self.job.task(index)
        return one

    def wait_until_ready(self, start: int = 0, node: int = 0):
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / f"ready.{start}.{node}").exists():
            assert time.monotonic() < deadline, self.job.output()
            time.sleep(0.05)

    def signal_batch(self):
        self.job.signal("USR1", "--batch")

    def files(self):
        return [name for name in names(self.folder) if not name.startswith("ready")]


@pytest.fixture(scope="module")
def trainings(slurm, place, repository):
    """All jobs, disturbed as their names say."""
    from jobs import Jobs

    jobs = Jobs(slurm, place)

    def submit(name, *actions, **options):
        return FakeTraining(jobs, repository, name, *actions, **options)

    trainings = {
        "fails": submit("fails", "fail"),
        "fails later": submit("fails_later", "save,fail", "fail"),
        "warned": submit("warned", "wait,save", "done", options=("--nodes=2",)),
        "asked by SIGTERM": submit("asked_by_sigterm", "wait,save", "done"),
        "dies of a warning": submit("dies", "wait,die", "done"),
        "saves nothing": submit("saves_nothing", "wait,mark", "wait,mark", "done"),
        "cancelled": submit("cancelled", "wait,slowly,save", "done"),
        "wrong": submit("wrong"),
        "elsewhere": FakeTraining(jobs, slurm.folder, "elsewhere", script=REPOSITORY / "slurm" / "train.sbatch"),
        "not installed": submit("not_installed", programs="not/there"),
        "array": submit("array_{}", "wait,save", "done", script="array.sbatch", options=("--array=0-1",)),
        "sweep": submit("sweep", script="sweep.sbatch", options=("--array=3",)),
        "evaluation": submit("evaluation", "wait,mark", "done", script="evaluate.sbatch"),
        "failed evaluation": submit("failed_evaluation", "save,fail", "done", script="evaluate.sbatch"),
    }
    to_be_warned = ("warned", "dies of a warning", "saves nothing", "evaluation")
    for name in to_be_warned:
        trainings[name].wait_until_ready()
    trainings["warned"].wait_until_ready(node=1)
    for name in to_be_warned:
        trainings[name].signal_batch()
    trainings["asked by SIGTERM"].wait_until_ready()
    slurm.run("scancel", "--signal=TERM", f"{trainings['asked by SIGTERM'].job.number}.0")
    trainings["cancelled"].wait_until_ready()
    slurm.run("scancel", trainings["cancelled"].job.number)
    trainings["saves nothing"].wait_until_ready(start=1)
    trainings["saves nothing"].signal_batch()
    for index in (0, 1):  # one of them has the number of the array
        training = trainings[f"task {index}"] = trainings["array"].task(index)
        training.wait_until_ready()
        training.signal_batch()
    trainings["sweep"].job = trainings["sweep"].job.task(3)
    trainings["sweep"].wait_until_ready()
    trainings["sweep"].signal_batch()
    yield trainings
    jobs.end()


def test_a_failure_ends_the_job_with_the_steps_code(trainings):
    job = trainings["fails"].job
    assert job.ended() == ("FAILED", 7, 0)
    assert "failed without a new checkpoint; not requeued" in job.output()
    assert trainings["fails"].files() == ["checkpoints"]


def test_failure_after_new_checkpoint_is_retried_once(trainings):
    job = trainings["fails later"].job
    assert job.ended() == ("FAILED", 7, 1)
    assert "requeueing; the next start resumes from last_0001_00000000.pt" in job.output()
    assert job.output().endswith("failed without a new checkpoint; not requeued\n")


@pytest.mark.parametrize("name", ["warned", "asked by SIGTERM", "dies of a warning"])
def test_a_signal_requeues_the_job_which_then_ends_well(trainings, name):
    training = trainings[name]
    assert training.job.ended() == ("COMPLETED", 0, 1), training.job.output()
    assert ("SIGUSR1: asking the ranks to save" in training.job.output()) == (name != "asked by SIGTERM")
    assert training.files() == ["checkpoints"]


def test_two_starts_without_progress_are_enough(trainings):
    job = trainings["saves nothing"].job
    assert job.ended() == ("FAILED", 1, 1)
    assert "2 starts in a row ended without a new checkpoint; not requeued" in job.output()


@pytest.mark.parametrize("index", [0, 1])
def test_a_job_of_an_array_requeues_itself_alone(trainings, index):
    training = trainings[f"task {index}"]
    assert training.job.ended() == ("COMPLETED", 0, 1), training.job.output()
    assert training.files() == ["checkpoints"]


def test_requeued_sweep_agent_saves_its_run_and_asks_again(trainings):
    training = trainings["sweep"]
    assert training.job.ended() == ("COMPLETED", 0, 1), training.job.output()
    call = f"launch/sweep.py --sweep-id {training.folder}\n"
    assert (training.folder / "arguments").read_text() == f"{call}saved\n{call}"


def test_preempted_evaluation_restarts_and_failed_one_ends(trainings):
    job = trainings["evaluation"].job
    assert job.ended() == ("COMPLETED", 0, 1), job.output()
    assert trainings["failed evaluation"].job.ended() == ("FAILED", 7, 0)


def test_cancelled_job_saves_and_is_not_requeued(trainings):
    training = trainings["cancelled"]
    assert training.job.ended()[::2] == ("CANCELLED", 0), training.job.output()
    assert "PREEMPTED" in training.files()
    assert (training.folder / "checkpoints" / "last_0001_00000000.pt").exists()
    assert "requeueing" not in training.job.output()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("elsewhere", "error: submit this from the root of the repository, got /"),
        ("not installed", "error: VENV_BIN must be the folder of python and torchrun, got not/there. Fix: uv sync"),
    ],
)
def test_job_that_cannot_run_reports_the_reason(trainings, name, message):
    job = trainings[name].job
    assert job.ended() == ("FAILED", 2, 0)
    assert message in job.output()


def test_invalid_settings_end_the_job_with_code_2(trainings):
    job = trainings["wrong"].job
    assert job.ended() == ("FAILED", 2, 0)
    assert job.output() == "error: KEY must be valid\n"


# ---- one at a time, because they change the cluster ----


@pytest.fixture
def submit(jobs, repository):
    return lambda name, *actions, **options: FakeTraining(jobs, repository, name, *actions, **options)


def test_preemption_without_warning_signal_requeues(slurm, jobs, submit):
    """Without preempt_send_user_signal, only the step gets SIGTERM."""
    with slurm.configured_without("SlurmctldParameters=preempt_send_user_signal"):
        first = submit("preempted", "wait,die", "done", options=("--exclusive", "--nodes=2"))
        first.wait_until_ready()
        urgent = jobs.wrap("sleep 1", options=("--partition=high", "--nodes=2", "--exclusive"))
        assert urgent.ended()[0] == "COMPLETED"
        assert first.job.ended()[:2] == ("COMPLETED", 0), first.job.output()
    assert "SIGUSR1" not in first.job.output()
    assert "the next start resumes from the beginning" in first.job.output()


def test_the_time_limit_requeues(submit):
    """Slurm may warn up to a minute early, that is at once here; by then the job must have started."""
    limited = submit("limited", "wait,save", "done", options=("--time=2", "--signal=B:USR1@50"))
    assert limited.job.ended() == ("COMPLETED", 0, 1), limited.job.output()
    assert "SIGUSR1: asking the ranks to save" in limited.job.output()


def test_disconnected_start_does_not_requeue_its_successor(slurm, jobs, submit):
    """Its step fails after a new checkpoint, which the start that runs elsewhere wrote, when its node comes back."""
    job = submit("cut_off", "until,fail", "wait,save", "done")
    job.wait_until_ready()
    node = job.job.state()["NodeList"]
    slurm.machines.unplug(node)
    job.wait_until_ready(start=1)
    (job.folder / "fail").touch()
    slurm.machines.plug(node)
    slurm.wait_until_gone(node, job.job.number)
    assert job.job.state()["Restarts"] == "1"
    with slurm.without_node(node):
        job.signal_batch()
        assert job.job.ended() == ("COMPLETED", 0, 2), job.job.output()
