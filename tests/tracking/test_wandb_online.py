"""Weights & Biases with a server: what arrives, who used what, and a server that goes away at the worst moments.

Also covers reid.tracking.upload_queue, reid.checkpoints.weight_file.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import wandb_files
import yaml
from disturbances import at_step, hang, signal_self
from PIL import Image
from program import REPOSITORY, TIMEOUT, TRAIN, Ended, Place, Ranks, newest, records, same, wait_for_file
from wandb_server import ENTITY, Run, WandbServer

from reid.checkpoints import weights
from reid.checkpoints.state_dicts import checksum_of
from reid.evaluation.gallery import read_metadata

pytestmark = pytest.mark.slow

PROJECT = "reid-strong-baseline"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.mute.clear()
    server.stop()
    assert server.unknown == []
    assert server.failures == []


def settings(output_dir: str, epochs: int, *others: object) -> list[object]:
    return ["OUTPUT_DIR", output_dir, "WANDB.ENABLE", "yes", "SOLVER.MAX_EPOCHS", epochs, *others]


def wandb_lines(ended: Ended) -> list[str]:
    return [line for line in ended.out.splitlines() if line.startswith("W&B")]


def steps(run: Run) -> list[int]:
    return [row["iteration"] for row in run.history if "train/loss" in row]


def steps_once(run: Run) -> list[int]:
    """Without the rows that had arrived when their segment was sent again; those have the same W&B step."""
    rows: dict[int, dict[str, Any]] = {}
    for row in run.history:
        assert rows.setdefault(row["_step"], row) == row
    assert list(rows) == sorted(rows)
    return [row["iteration"] for row in rows.values() if "train/loss" in row]


def the_run(server: WandbServer) -> Run:
    (run,) = server.runs.values()
    return run


def send(place: Place, server: WandbServer, ended: Ended) -> None:
    """Run the command of the last line."""
    (command,) = re.findall(r"send it with: (wandb sync .*)", ended.out)
    given = {name: value for name, value in server.environment.items() if value is not None}
    environment = {name: value for name, value in place.environment.items() if name != "WANDB_MODE"} | given
    subprocess.run(
        command, shell=True, cwd=place.folder, env=environment, check=True, timeout=TIMEOUT, capture_output=True
    )


# ---- a run on two ranks, and the evaluation of what it has made ----


@pytest.fixture(scope="module")
def online(place) -> Iterator[tuple[WandbServer, Ended, Ended]]:
    server = WandbServer()
    options = {"environment": server.environment, "num_ranks": 2}
    trained = place.train(*settings("online", 2, "WANDB.LOG_CHECKPOINTS", "best+last"), **options)
    (run_id,) = server.runs
    weight = f"wandb:{ENTITY}/{PROJECT}/synthetic-resnet18-{run_id}:best"
    evaluated, _ = place.run("evaluate", *settings("online evaluation", 2, "TEST.WEIGHT", weight), **options)
    yield server, trained, evaluated
    server.stop()
    assert server.unknown == []
    assert server.failures == []


def runs(server: WandbServer) -> tuple[Run, Run]:
    trained, evaluated = server.runs.values()
    return trained, evaluated


def test_two_ranks_are_one_run_whose_url_is_printed_twice(place, online):
    server, ended, _ = online
    run, _ = runs(server)
    url = f"{server.url}/{ENTITY}/{PROJECT}/runs/{run.name}"
    assert wandb_lines(ended) == [f"W&B: run run-{run.name} ({url})", f"W&B: all is at {url}"]
    assert ended.err == ""
    assert len(list((place.folder / "online").glob("wandb/*run-*/run-*.wandb"))) == 1
    assert run.ends[-1]["exitcode"] == 0


def test_every_row_arrives(place, online):
    run, _ = runs(online[0])
    sent = [{name: value for name, value in row.items() if not name.startswith("_")} for row in run.history]
    train = [{k: v for k, v in record.items() if k != "kind"} for record in records(place.folder / "online", "train")]
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for row, record in zip([row for row in sent if "train/loss" in row], train, strict=True):
        assert {name.removeprefix("train/"): value for name, value in row.items()} == pytest.approx(record)
    assert run.summary["val/mAP_best"] == pytest.approx(max(r["mAP"] for r in records(place.folder / "online", "val")))


def test_best_and_last_checkpoints_are_logged_as_artifacts(place, online):
    server, _, _ = online
    run, _ = runs(server)
    for kind, type_, name in (("best", "model", ""), ("last", "checkpoint", "-last")):
        artifact = server.artifact(f"synthetic-resnet18-{run.name}{name}", "latest")
        file = sorted((place.folder / "online" / "checkpoints").glob(f"{kind}_*.pt"))[-1]
        assert (artifact.type, artifact.state, artifact.run) == (type_, "COMMITTED", run.name)
        epoch = artifact.metadata["epoch"]
        assert {"latest", kind, f"epoch-{epoch}"} == set(artifact.aliases)
        assert server.files_of(artifact) == {file.name: file.read_bytes()}
        assert artifact.metadata["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        (val,) = (record for record in records(place.folder / "online", "val") if record["epoch"] == epoch)
        expected = {"mAP": val["mAP"], "rank-1": val["rank-1"], "iteration": val["iteration"], "world_size": 2}
        assert expected.items() <= artifact.metadata.items()


def test_what_is_sent_is_not_kept_twice(place, online):
    assert list((place.folder / "online" / "wandb").rglob("*.pt")) == []
    copies = [file for folder in ("home", "wandb") for file in (place.folder / folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in copies) < 1e6


def test_evaluation_run_uses_model_and_dataset_artifacts(online):
    server, _, _ = online
    trained, evaluated = runs(server)
    made = {artifact.id: artifact for artifact in server.artifacts}
    assert [(made[id_].type, made[id_].collection) for id_ in trained.used] == [("dataset", "synthetic")]
    used = {made[id_].type: made[id_] for id_ in evaluated.used}
    assert used["dataset"].collection == "synthetic-test"
    assert used["model"] is server.artifact(f"synthetic-resnet18-{trained.name}", "best")
    assert (trained.fields["jobType"], evaluated.fields["jobType"]) == ("train", "eval")


def test_the_fetched_model_scores_on_all_ranks_as_in_training(place, online):
    server, _, ended = online
    trained, evaluated = runs(server)
    assert ended.code == 0, ended
    assert evaluated.summary["test/mAP"] == pytest.approx(trained.summary["val/mAP_best"], abs=1e-6)
    assert "TEST.WEIGHT=wandb:" in ended.out


def test_the_evaluation_of_a_local_file_finds_its_model(place, online):
    server, _, _ = online
    (file,) = (place.folder / "online" / "checkpoints").glob("best_*.pt")
    (ended,) = place.run("evaluate", *settings("local", 2, "TEST.WEIGHT", file), environment=server.environment)
    assert ended.code == 0, ended
    made = {artifact.id: artifact for artifact in server.artifacts}
    assert "model" in {made[id_].type for id_ in list(server.runs.values())[-1].used}


@pytest.fixture
def photos(place) -> Path:
    folder = place.folder / "photos of nobody"
    folder.mkdir(exist_ok=True)
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (16, 32), color).save(folder / f"{name}.png")
    return folder


def test_embed_search_and_export_fetch_model_from_wandb(place, online, photos):
    server, _, _ = online
    trained = next(iter(server.runs))
    weight = f"wandb:{ENTITY}/{PROJECT}/synthetic-resnet18-{trained}:best"
    (file,) = (place.folder / "online" / "checkpoints").glob("best_*.pt")
    checksum = checksum_of(weights.read_file(file, "FILE"))
    options = {"environment": server.environment, "bare": True}
    asked = server.operations.count("ArtifactMembershipByName")

    ended, _ = place.run("embed", photos, "TEST.WEIGHT", weight, "--output", "fetched", **options, num_ranks=2)
    assert (ended.code, ended.err) == (0, ""), ended
    facts = read_metadata(place.folder / "fetched")
    assert (facts.checksum, facts.num_images) == (checksum, 3)
    assert yaml.safe_load(facts.config)["INPUT"]["SIZE_TEST"] == [32, 16]
    assert server.operations.count("ArtifactMembershipByName") == asked + 1  # by one rank, once

    (ended,) = place.run("search", photos / "b.png", "--gallery", "fetched", "TEST.WEIGHT", weight, **options)
    assert ended.code == 0, ended
    assert re.search(r" 1 +1.0000  b.png", ended.out)

    words = ("--to", "safetensors", "--check", "none", "--output", "exported", "TEST.WEIGHT", weight)
    (ended,) = place.run("export", *words, **options)
    assert ended.code == 0, ended
    (made,) = (place.folder / "exported").glob("best_*.safetensors")
    assert checksum_of(weights.read_file(made, "FILE")) == checksum


@pytest.mark.parametrize(
    ("weight", "message", "code"),
    [
        ("wandb:best", "TEST.WEIGHT must be a file or wandb:ENTITY/PROJECT/NAME:ALIAS, got 'wandb:best'. Fix: use", 2),
        (f"wandb:{ENTITY}/{PROJECT}/nothing:best", "TEST.WEIGHT must be available at W&B, got ", 1),
    ],
)
def test_missing_model_artifact_is_reported_in_one_sentence(place, online, photos, weight, message, code):
    given = settings("gone", 2, "TEST.WEIGHT", weight)
    options = {"environment": online[0].environment, "num_ranks": 2, "code": code}
    assert message in place.refusal("evaluate", *given, **options)
    assert message in place.refusal("embed", photos, "TEST.WEIGHT", weight, **options, bare=True)


def test_the_key_is_written_nowhere(place, online):
    key = str(online[0].environment["WANDB_API_KEY"]).encode()
    files = [file for folder in ("online", "home", "wandb") for file in (place.folder / folder).rglob("*")]
    assert not [file for file in files if file.is_file() and file.suffix != ".pt" and key in file.read_bytes()]


# ---- resuming ----


def test_preempted_run_resumes_as_the_same_run(place, server):
    given = settings("preempted", 6)
    stop = partial(at_step, 4, partial(signal_self, signal.SIGTERM))
    stopped = place.run("train", *given, environment=server.environment, num_ranks=2, before=stop)
    assert [ended.code for ended in stopped] == [85, 85], stopped
    # Not necessarily in the last request: wandb-core sends it and the end in any order.
    assert any(end.get("preempting") for end in the_run(server).ends)
    ended = place.train(*given, environment=server.environment)
    assert wandb_lines(ended)[0].startswith("W&B: continuing run ")
    assert steps(the_run(server)) == list(range(1, 13))
    assert [row["_step"] for row in the_run(server).history] == list(range(len(the_run(server).history)))
    assert the_run(server).config["world_size"]["value"] == 1


def test_run_stopped_by_wandb_is_saved_and_not_marked_preempted(place, server):
    """Else a sweep that ends a hopeless trial would start it again."""
    ranks = place.start("train", *settings("stopped", 200), environment=server.environment, num_ranks=2)
    ranks.wait_for("epoch 2/200 step 2/2")
    server.stops = True
    first, second = ranks.ended()
    assert (first.code, second.code, first.err) == (85, 85, "")
    assert wandb_lines(first)[1] == "W&B: the run is to stop"
    assert the_run(server).ends[-1]["exitcode"] == 1
    assert not any(end.get("preempting") for end in the_run(server).ends)
    assert newest(place.folder / "stopped")["iteration"] == steps(the_run(server))[-1]


def wait_for_rows(folder: Path, number: int) -> None:
    """Until the training rows of the only part are on the disk, where W&B's process writes them every moment."""
    segment, deadline = wait_for_file(folder / "wandb" / "run-*"), time.monotonic() + TIMEOUT
    wait_for_file(segment / "run-*.wandb")
    while sum("train/loss" in row for row in wandb_files.rows(segment)) < number:
        assert time.monotonic() < deadline, f"{number} rows are not in {segment}"
        time.sleep(0.05)


def test_rows_of_killed_rank_0_arrive_with_the_next_start(place, server):
    given = settings("killed", 6)
    ranks = place.start("train", *given, environment=server.environment, before=partial(at_step, 6, hang))
    wait_for_rows(place.folder / "killed", 5)
    ranks.kill()
    place.train(*given, environment=server.environment)
    assert sorted(set(steps(the_run(server)))) == list(range(1, 13))
    assert steps_once(the_run(server))[:5] == list(range(1, 6))


def test_offline_records_are_synced_before_the_run_resumes(place, server):
    given = settings("later", 5, "WANDB.INIT_TIMEOUT", 1, "WANDB.LOG_CHECKPOINTS", "best")
    server.stop()
    stop = partial(at_step, 4, partial(signal_self, signal.SIGTERM))
    (ended,) = place.run("train", *given, environment=server.environment, before=stop)
    assert (ended.code, len(wandb_lines(ended))) == (85, 2)
    assert "(offline, as W&B did not answer (" in wandb_lines(ended)[0]
    server.again()
    ended = place.train(*given[:-2], environment=server.environment)
    assert wandb_lines(ended)[-1].startswith("W&B: all is at ")
    assert steps(the_run(server)) == list(range(1, 11))
    assert {artifact.state for artifact in server.artifacts} == {"COMMITTED"}


def test_three_offline_parts_become_one_run_with_all_checkpoints(place, server):
    given = settings("segments", 6, "WANDB.LOG_CHECKPOINTS", "best+last")
    for _ in range(2):
        (ended,) = place.run("train", *given, before=partial(at_step, 4, partial(signal_self, signal.SIGTERM)))
        assert ended.code == 85, ended
    ended = place.train(*given)
    assert len(re.findall("offline-run-", wandb_lines(ended)[-1])) == 3
    send(place, server, ended)
    run = the_run(server)
    assert steps(run) == list(range(1, 13))
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    assert {artifact.state for artifact in server.artifacts} == {"COMMITTED"}
    checkpoints = [artifact for artifact in server.artifacts if artifact.type in ("model", "checkpoint")]
    assert {artifact.type for artifact in checkpoints} == {"model", "checkpoint"}
    for artifact in checkpoints:  # rotated away long ago
        ((name, content),) = server.files_of(artifact).items()
        assert hashlib.sha256(content).hexdigest() == artifact.metadata["sha256"], name
    assert {row["epoch"] for row in run.history if "val/mAP" in row} == set(range(1, 7))


# ---- going away ----

AWAY = {
    "gone": lambda server: server.stop(),
    "silent": lambda server: server.mute.set(),
    "500": lambda server: setattr(server, "status", 500),
    "401": lambda server: setattr(server, "status", 401),
}


def come_back(server: WandbServer, how: str) -> None:
    server.mute.clear()
    server.status = 0
    if how == "gone":
        server.again()


def cores(ranks: Ranks) -> list[str]:
    """Return the wandb-core processes of rank 0, which may have ended itself."""
    files = [folder / "cmdline" for folder in Path("/proc").glob("[0-9]*")]
    lines = []
    for file in files:
        with contextlib.suppress(OSError):  # it has ended since
            lines.append(file.read_bytes().decode().split("\0"))
    return [line[0] for line in lines if "wandb-core" in line[0] and str(ranks.pid()) in line]


def check_all_arrived(place: Place, server: WandbServer, folder: str, num_steps: int) -> None:
    """Every row, and the best model and the tables that belong to it, whatever became of the server in between."""
    run = the_run(server)
    assert sorted(set(steps(run))) == list(range(1, num_steps + 1))
    made = [artifact for artifact in server.artifacts if artifact.state == "COMMITTED"]
    (best,) = (place.folder / folder / "checkpoints").glob("best_*.pt")
    assert any(server.files_of(one) == {best.name: best.read_bytes()} for one in made if one.type == "model")
    bests = {one.metadata["epoch"] for one in made if one.type == "model"}
    assert {row["epoch"] for row in run.history if "val/AP_per_query" in row} == bests
    assert len({one.digest for one in made if one.type == "run_table"}) == 2 * len(bests)  # and its CMC curve


@pytest.mark.parametrize("how", AWAY)
def test_server_loss_during_training_loses_no_rows(place, server, how):
    given = settings(f"away {how}", 4, "WANDB.FINISH_TIMEOUT", 12)
    is_away = place.folder / f"is away {how}"
    ranks = place.start(
        *("train", *given),
        environment=server.environment,
        num_ranks=2 if how == "gone" else 1,
        before=partial(at_step, 3, partial(wait_for_file, is_away)),
    )
    ranks.wait_for("epoch 1/4 step 2/2")
    AWAY[how](server)
    is_away.touch()
    ended, *_ = ranks.ended()
    assert (ended.code, ended.err) == (0, ""), ended
    assert "W&B: not all could be sent; send it with: wandb sync --include-online " in ended.out
    assert len(wandb_lines(ended)) == 2
    assert cores(ranks) == []
    come_back(server, how)
    send(place, server, ended)
    check_all_arrived(place, server, f"away {how}", 8)


@pytest.mark.parametrize("moment", ["W&B: run ", "epoch 2: mAP"])
def test_server_loss_before_artifact_or_at_the_end_loses_nothing(place, server, moment):
    folder = f"away at {len(moment)}"
    ranks = place.start("train", *settings(folder, 2, "WANDB.FINISH_TIMEOUT", 6), environment=server.environment)
    ranks.wait_for(moment)
    server.stop()
    (ended,) = ranks.ended()
    assert (ended.code, ended.err, len(wandb_lines(ended))) == (0, "", 2), ended
    assert cores(ranks) == []
    server.again()
    send(place, server, ended)
    check_all_arrived(place, server, folder, 4)


def test_real_processes_end_without_a_server_as_well(place, server):
    """Those of the other tests are forked, and leave out what Python and wandb do at the very end."""
    given = {name: value for name, value in server.environment.items() if value is not None}
    words = ["torchrun", "--standalone", "--nproc_per_node=2", TRAIN, "--config_file", "tiny.yml"]
    words += settings("away from torchrun", 30, "WANDB.FINISH_TIMEOUT", 4, "SOLVER.EVAL_PERIOD", 10)
    log = place.folder / "torchrun.log"
    environment = {name: value for name, value in place.environment.items() if name != "WANDB_MODE"} | given
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [str(word) for word in words], cwd=place.folder, env=environment, stdout=stream, stderr=stream
        ) as launcher,
    ):
        while "epoch 2/30 step 2/2" not in log.read_text():
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.1)
        below = psutil.Process(launcher.pid).children(recursive=True)
        (service,) = (process for process in below if process.name() == "wandb-core")
        server.stop()
        assert launcher.wait(TIMEOUT) == 0, log.read_text()
    ended = Ended(0, log.read_text(), "")
    assert "Traceback" not in ended.out
    assert len(wandb_lines(ended)) == 2
    assert not service.is_running()
    server.again()
    send(place, server, ended)
    assert sorted(set(steps(the_run(server)))) == list(range(1, 61))


def paused_then_stopped() -> None:
    """Let the third step wait for a file, and signal in the fourth; called before the program starts."""
    at_step(3, partial(wait_for_file, "is away"))
    at_step(4, partial(signal_self, signal.SIGTERM))


def test_next_start_sends_what_a_lost_server_missed(place, server):
    given = settings("came back", 4)
    ranks = place.start(
        *("train", *given, "WANDB.FINISH_TIMEOUT", 6), environment=server.environment, before=paused_then_stopped
    )
    ranks.wait_for("epoch 1/4 step 2/2")
    server.stop()
    (place.folder / "is away").touch()
    (ended,) = ranks.ended()
    assert (ended.code, cores(ranks)) == (85, []), ended
    server.again()
    ended = place.train(*given, environment=server.environment)
    assert wandb_lines(ended)[0].startswith("W&B: continuing run ")
    assert wandb_lines(ended)[-1].startswith("W&B: all is at ")
    check_all_arrived(place, server, "came back", 8)
    assert steps_once(the_run(server)) == list(range(1, 9))
    assert list((place.folder / "came back" / "wandb").rglob("*.pt")) == []


def test_wandb_process_ends_with_killed_rank_0_without_server(place, server):
    given = settings("orphan", 4)
    ranks = place.start("train", *given, environment=server.environment, before=partial(at_step, 6, hang))
    ranks.wait_for("epoch 1/4 step 2/2")
    server.stop()
    ranks.wait_for("epoch 3/4 step 1/2")
    assert len(cores(ranks)) == 1
    ranks.kill()
    deadline = time.monotonic() + TIMEOUT
    while cores(ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cores(ranks) == []


def test_on_failure_disable_does_without(place, server):
    server.stop()
    given = settings("disable", 1, "WANDB.INIT_TIMEOUT", 1, "WANDB.ON_FAILURE", "disable")
    ended = place.train(*given, environment=server.environment)
    (line,) = wandb_lines(ended)
    assert line.startswith("W&B: disabled, as W&B did not answer (")
    assert not list((place.folder / "disable" / "wandb").glob("offline-run-*"))


def test_on_failure_raise_ends_at_once_at_the_start(place, server):
    server.stop()
    given = settings("raise", 1, "WANDB.INIT_TIMEOUT", 1, "WANDB.ON_FAILURE", "raise")
    sentence = place.refusal("train", *given, environment=server.environment, num_ranks=2, code=1)
    assert sentence.startswith("W&B cannot be reached: W&B did not answer (")
    assert "WANDB.ON_FAILURE offline" in sentence


def test_on_failure_raise_ends_later_with_all_saved(place, server):
    given = settings("raise late", 2, "WANDB.FINISH_TIMEOUT", 6, "WANDB.ON_FAILURE", "raise")
    is_away = place.folder / "is away to raise"
    ranks = place.start(
        *("train", *given),
        environment=server.environment,
        num_ranks=2,
        before=partial(at_step, 2, partial(wait_for_file, is_away)),
    )
    ranks.wait_for("epoch 1/2 step 1/2")
    server.stop()
    is_away.touch()
    first, second = ranks.ended()
    assert first.code == 1, first
    assert re.fullmatch("error: W&B lacks a part of this run: .*; the training itself is complete.*\n", first.err)
    assert second.err == ""
    assert newest(place.folder / "raise late")["epoch"] == 2
    server.again()
    send(place, server, first)
    assert steps_once(the_run(server)) == [1, 2, 3, 4]


def test_resume_must_refuses_another_run(place, server):
    given = settings("must", 1, "WANDB.RESUME", "must", "WANDB.RUN_ID", "unknown1")
    sentence = place.refusal("train", *given, environment=server.environment, code=2)
    assert sentence.startswith("WANDB.RESUME must fit the run at W&B, got must: ")


def test_training_does_not_depend_on_wandb(place, server):
    place.train(*settings("with", 2), environment=server.environment)
    place.train("OUTPUT_DIR", "without", "WANDB.ENABLE", "no", "SOLVER.MAX_EPOCHS", 2)
    assert same(newest(place.folder / "with")["model"], newest(place.folder / "without")["model"])


# ---- sweeps ----


@pytest.fixture
def sweep_of(place, server) -> dict[str, Any]:
    """Return the demo's sweep on the tiny model, written to sweep.yaml; the server has its trials."""
    sweep = yaml.safe_load((REPOSITORY / "configs" / "sweeps" / "demo.yaml").read_text())
    sweep["program"] = str(REPOSITORY / "launch" / "train.py")
    config = ["--config_file=tiny.yml", "WANDB.ENABLE=yes", "OUTPUT_DIR=sweep"]
    sweep["command"] = [word for word in sweep["command"] if "config_file" not in word][:-1] + config
    sweep["command"].append("${args_no_hyphens}")
    (place.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return sweep


def add_trial(server: WandbServer, sweep: dict[str, Any], name: str, rate: float) -> None:
    args = {"SOLVER.BASE_LR": {"value": rate}, "SOLVER.MARGIN": {"value": 0.3}}
    server.trials.append({"type": "run", "run_id": name, "program": sweep["program"], "args": args})


def check_trial(place: Place, server: WandbServer, name: str, rate: float) -> None:
    run = server.runs[name]
    assert run.fields["sweep"] == "sweep1"
    assert run.config["SOLVER"]["value"]["BASE_LR"] == rate
    assert run.config["world_size"]["value"] == 2
    assert steps(run) == [1, 2, 3, 4]
    assert "val/mAP_best" in run.summary
    (last,) = sorted((place.folder / "sweep" / name / "checkpoints").glob("last_*"))[-1:]
    assert f"BASE_LR: {rate}" in torch.load(last, weights_only=True)["config"]


def done(place: Place, *words: object, environment: dict[str, str | None]) -> str:
    changed = {name: value for name, value in place.environment.items() if name != "WANDB_MODE"} | environment
    given = {name: value for name, value in changed.items() if value is not None}
    options = {"cwd": place.folder, "env": given, "timeout": 500, "capture_output": True, "text": True}
    ended = subprocess.run([str(word) for word in words], check=False, **options)
    assert ended.returncode == 0, ended
    return ended.stdout + ended.stderr


def test_sweep_py_starts_torchrun_once_for_each_trial(place, server, sweep_of):
    given = {name: value for name, value in server.environment.items() if value is not None}
    (place.folder / ".env").write_text("\n".join(f"export {name}='{value}'" for name, value in given.items()))
    add_trial(server, sweep_of, "second", 0.002)
    add_trial(server, sweep_of, "first", 0.001)
    words = (REPOSITORY / "launch" / "sweep.py", "--sweep-config", "sweep.yaml", "--count", 2)
    output = done(place, sys.executable, *words, environment={})
    (place.folder / ".env").unlink()
    assert f"W&B: sweep {PROJECT}/sweep1; the same on another machine: wandb agent {PROJECT}/sweep1\n" in output
    assert sorted(server.runs) == ["first", "second"]
    check_trial(place, server, "first", 0.001)
    check_trial(place, server, "second", 0.002)


def test_the_commands_of_wandb_do_the_same(place, server, sweep_of):
    output = done(place, "wandb", "sweep", "sweep.yaml", environment=server.environment)
    (agent,) = re.findall(r"wandb agent (\S+)", output)
    add_trial(server, sweep_of, "third", 0.003)
    done(place, "wandb", "agent", "--count", 1, agent, environment=server.environment)
    assert list(server.runs) == ["third"]
    check_trial(place, server, "third", 0.003)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml")), ids=lambda file: file.name)
def test_wandb_takes_the_shipped_sweeps_as_they_are(place, server, file):
    done(place, "wandb", "sweep", file, environment=server.environment)
    made, written = yaml.safe_load(server.sweep["config"]), yaml.safe_load(file.read_text())
    assert {name: made[name] for name in ("method", "metric", "early_terminate", "command", "program", "run_cap")} == {
        name: written[name] for name in ("method", "metric", "early_terminate", "command", "program", "run_cap")
    }
    assert made["parameters"] == written["parameters"]
