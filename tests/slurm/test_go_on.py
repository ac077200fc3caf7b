"""What becomes of a job when its step ends, on a real Slurm; what torchrun does is played by a script.

All jobs run at the same time, as most of it is waiting.
"""

import copy
import time
from pathlib import Path

import pytest
from jobs import PATIENCE
from program import REPOSITORY, names

# Plays one word for each start of the job. What is saved is saved by the first node.
TORCHRUN = r"""#!/usr/bin/env bash
until [[ $1 == launch/train.py ]]; do shift; done
out=$2; shift 2; words=("$@"); start=${SLURM_RESTART_COUNT:-0}; word=${words[$start]}
mkdir -p "$out/checkpoints"
save() { [[ $SLURM_NODEID != 0 ]] || touch "$out/checkpoints/last_0001_0000000$start.pt"; }
mark() { [[ $SLURM_NODEID != 0 ]] || touch "$out/PREEMPTED"; }
end() { exit 1; }
ready() { touch "$out/ready.$start.$SLURM_NODEID"; while :; do sleep 0.1; done; }
case $word in
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
  [[ $6 != */wrong ]] || { echo "error: something must be right" >&2; exit 2; }
  printf '%s\n' "$3" "$6"
else # launch/sweep.py: an agent that has a run at hand when it is first started, and none when it is started again
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
    """The scripts, and programs that play."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "slurm").symlink_to(REPOSITORY / "slurm")
    (folder / "programs").mkdir()
    for name, text in {"torchrun": TORCHRUN, "python": PYTHON}.items():
        (folder / "programs" / name).write_text(text)
        (folder / "programs" / name).chmod(0o755)
    return folder


class Play:
    """A job whose torchrun plays."""

    def __init__(
        self,
        jobs,
        repository: Path,
        output_dir: str,
        *words: str,
        options=(),
        script="train.sbatch",
        programs="programs",
    ):
        self.folder = repository / "runs" / output_dir
        environment = {"VENV_BIN": programs, "SAVE_SECONDS": "20", "PROGRAM": "launch/train.py"}
        self.job = jobs.submit(
            script,
            self.folder,
            *words,
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
            assert time.monotonic() < deadline, self.job.said()
            time.sleep(0.05)

    def signal_batch(self):
        self.job.signal("USR1", "--batch")

    def left(self):
        return [name for name in names(self.folder) if not name.startswith("ready")]


@pytest.fixture(scope="module")
def plays(slurm, place, repository):
    """All jobs, to their end."""
    from jobs import Jobs

    jobs = Jobs(slurm, place)

    def play(name, *words, **options):
        return Play(jobs, repository, name, *words, **options)

    plays = {
        "fails": play("fails", "fail"),
        "fails later": play("fails_later", "save,fail", "fail"),
        "warned": play("warned", "wait,save", "done", options=("--nodes=2",)),
        "asked by SIGTERM": play("asked_by_sigterm", "wait,save", "done"),
        "dies of a warning": play("dies", "wait,die", "done"),
        "saves nothing": play("saves_nothing", "wait,mark", "wait,mark", "done"),
        "cancelled": play("cancelled", "wait,slowly,save", "done"),
        "wrong": play("wrong"),
        "elsewhere": Play(jobs, slurm.folder, "elsewhere", script=REPOSITORY / "slurm" / "train.sbatch"),
        "not installed": play("not_installed", programs="not/there"),
        "array": play("array_{}", "wait,save", "done", script="array.sbatch", options=("--array=0-1",)),
        "sweep": play("sweep", script="sweep.sbatch", options=("--array=3",)),
        "evaluation": play("evaluation", "wait,mark", "done", script="evaluate.sbatch"),
        "failed evaluation": play("failed_evaluation", "save,fail", "done", script="evaluate.sbatch"),
    }
    to_be_warned = ("warned", "dies of a warning", "saves nothing", "evaluation")
    for name in to_be_warned:
        plays[name].wait_until_ready()
    plays["warned"].wait_until_ready(node=1)
    for name in to_be_warned:
        plays[name].signal_batch()
    plays["asked by SIGTERM"].wait_until_ready()
    slurm.run("scancel", "--signal=TERM", f"{plays['asked by SIGTERM'].job.number}.0")
    plays["cancelled"].wait_until_ready()
    slurm.run("scancel", plays["cancelled"].job.number)
    plays["saves nothing"].wait_until_ready(start=1)
    plays["saves nothing"].signal_batch()
    for index in (0, 1):  # one of them has the array's own number
        play = plays[f"task {index}"] = plays["array"].task(index)
        play.wait_until_ready()
        play.signal_batch()
    plays["sweep"].job = plays["sweep"].job.task(3)
    plays["sweep"].wait_until_ready()
    plays["sweep"].signal_batch()
    yield plays
    jobs.end()


def test_a_failure_ends_the_job_with_the_steps_code(plays):
    job = plays["fails"].job
    assert job.ended() == ("FAILED", 7, 0)
    assert "failed without a new checkpoint; not started again" in job.said()
    assert plays["fails"].left() == ["checkpoints"]


def test_failure_after_new_checkpoint_is_retried_once(plays):
    job = plays["fails later"].job
    assert job.ended() == ("FAILED", 7, 1)
    assert "to be started again, from last_0001_00000000.pt" in job.said()
    assert job.said().endswith("failed without a new checkpoint; not started again\n")


@pytest.mark.parametrize("name", ["warned", "asked by SIGTERM", "dies of a warning"])
def test_a_signal_requeues_the_job_which_then_ends_well(plays, name):
    play = plays[name]
    assert play.job.ended() == ("COMPLETED", 0, 1), play.job.said()
    assert ("SIGUSR1: asks the ranks to save" in play.job.said()) == (name != "asked by SIGTERM")
    assert play.left() == ["checkpoints"]


def test_two_starts_without_progress_are_enough(plays):
    job = plays["saves nothing"].job
    assert job.ended() == ("FAILED", 1, 1)
    assert "2 starts in a row have ended without a new checkpoint, so this job ends" in job.said()


@pytest.mark.parametrize("index", [0, 1])
def test_a_job_of_an_array_requeues_itself_alone(plays, index):
    play = plays[f"task {index}"]
    assert play.job.ended() == ("COMPLETED", 0, 1), play.job.said()
    assert play.left() == ["checkpoints"]


def test_requeued_sweep_agent_saves_its_run_and_asks_again(plays):
    play = plays["sweep"]
    assert play.job.ended() == ("COMPLETED", 0, 1), play.job.said()
    call = f"launch/sweep.py --sweep-id {play.folder}\n"
    assert (play.folder / "arguments").read_text() == f"{call}saved\n{call}"


def test_preempted_evaluation_restarts_and_failed_one_ends(plays):
    job = plays["evaluation"].job
    assert job.ended() == ("COMPLETED", 0, 1), job.said()
    assert plays["failed evaluation"].job.ended() == ("FAILED", 7, 0)


def test_cancelled_job_saves_and_is_not_requeued(plays):
    play = plays["cancelled"]
    assert play.job.ended()[::2] == ("CANCELLED", 0), play.job.said()
    assert "PREEMPTED" in play.left()
    assert (play.folder / "checkpoints" / "last_0001_00000000.pt").exists()
    assert "to be started again" not in play.job.said()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("elsewhere", "error: submit this from the root of the repository, not from /"),
        ("not installed", "error: VENV_BIN must be the folder of python and torchrun, got not/there; run uv sync"),
    ],
)
def test_job_that_cannot_run_reports_the_reason(plays, name, words):
    job = plays[name].job
    assert job.ended() == ("FAILED", 2, 0)
    assert words in job.said()


def test_wrong_settings_end_the_job_with_code_2_and_one_sentence(plays):
    job = plays["wrong"].job
    assert job.ended() == ("FAILED", 2, 0)
    assert job.said() == "error: something must be right\n"


# ---- alone, as they change the cluster ----


@pytest.fixture
def play(jobs, repository):
    return lambda name, *words, **options: Play(jobs, repository, name, *words, **options)


def test_preemption_without_warning_signal_requeues(slurm, jobs, play):
    """As where the site has not set preempt_send_user_signal: SIGTERM to the step alone."""
    with slurm.configured_without("SlurmctldParameters=preempt_send_user_signal"):
        first = play("preempted", "wait,die", "done", options=("--exclusive", "--nodes=2"))
        first.wait_until_ready()
        urgent = jobs.wrap("sleep 1", options=("--partition=high", "--nodes=2", "--exclusive"))
        assert urgent.ended()[0] == "COMPLETED"
        assert first.job.ended()[:2] == ("COMPLETED", 0), first.job.said()
    assert "SIGUSR1" not in first.job.said()
    assert "to be started again, from the beginning" in first.job.said()


def test_the_time_limit_requeues(play):
    """Slurm may warn up to a minute earlier than asked to, so at once here; the job must be under way by then."""
    limited = play("limited", "wait,save", "done", options=("--time=2", "--signal=B:USR1@50"))
    assert limited.job.ended() == ("COMPLETED", 0, 1), limited.job.said()
    assert "SIGUSR1: asks the ranks to save" in limited.job.said()


def test_disconnected_start_does_not_requeue_its_successor(slurm, jobs, play):
    """Its step fails, behind a new checkpoint, when its node comes back: of the start that runs elsewhere."""
    job = play("cut_off", "until,fail", "wait,save", "done")
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
        assert job.job.ended() == ("COMPLETED", 0, 2), job.job.said()
