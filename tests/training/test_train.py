"""The program from its command line to its files.

Also covers reid.training.console, reid.commands.evaluate, reid.training.train.
"""

import csv
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import REPOSITORY, SMALL, TRAIN, Ended, Place, names, records

from reid.config.load import as_plain_dict, load_config

SCORES = ["mAP", "mINP", "rank-1", "rank-5", "rank-10"]
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node=2")
# As in a job with one task per node, in which torchrun makes the ranks.
SLURM_JOB = {
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NODELIST": "localhost",
}


# ---- one training on two ranks, started in another folder than the repository ----


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


@pytest.fixture(scope="module")
def output_dir(place: Place) -> Path:
    return place.folder / "Läufe" / "der erste"


@pytest.fixture(scope="module")
def first(place: Place, output_dir: Path) -> Ended:
    settings = ("WANDB.ENABLE", "yes", "OUTPUT_DIR", output_dir.relative_to(place.folder))
    return place.train(*settings, num_ranks=2, environment=SLURM_JOB)


def test_training_ends_well_without_complaints(first):
    assert first.code == 0, first
    assert first.err == ""
    assert not re.search("warning|traceback|deprecat", first.out, re.IGNORECASE)


def test_only_rank_0_prints(first):
    lines = first.out.splitlines()
    assert sum(line.startswith(f"training {SMALL}") for line in lines) == 1
    assert sum(line.startswith("W&B: run") for line in lines) == 1
    assert [line for line in lines if lines.count(line) > 1] == []


def test_torchrun_ranks_are_not_confused_with_slurm_tasks(first, output_dir):
    environment = json.loads((output_dir / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert [rank["rank"] for rank in environment["ranks"]] == [0, 1]


def test_environment_names_commit_versions_hosts_and_devices(first, output_dir):
    environment = json.loads((output_dir / "environment.json").read_text())
    head = subprocess.run(["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert environment["commit"].removesuffix("+") == head.stdout.strip()
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["versions"]["python"] == sys.version.split()[0]
    assert {rank["host"] for rank in environment["ranks"]} == {socket.gethostname()}
    assert all(rank["device"].startswith("CPU") for rank in environment["ranks"])


def test_recorded_configuration_loads_to_the_same_settings(first, place, output_dir):
    overrides = ["WANDB.ENABLE", "yes", "OUTPUT_DIR", str(output_dir.relative_to(place.folder))]
    given = load_config(str(place.folder / "tiny.yml"), overrides)
    assert load_config(str(output_dir / "config.yaml"), []) == given


def test_metrics_hold_every_step_and_every_evaluation(first, output_dir):
    train, val = records(output_dir, "train"), records(output_dir, "val")
    assert [(record["epoch"], record["iteration"]) for record in train] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert [(record["epoch"], record["iteration"]) for record in val] == [(1, 2), (2, 4)]
    for record in train:
        assert {"loss", "id", "triplet", "acc", "grad_norm", "lr", "images_per_second", "data_wait"} < record.keys()
        assert record["loss"] == pytest.approx(record["id"] + record["triplet"])
        assert 0 <= record["acc"] <= 1
        assert 0 <= record["data_wait"] <= 1


def test_result_is_the_last_evaluation_in_fractions(first, output_dir):
    result = json.loads((output_dir / "result.json").read_text())
    assert {"kind": "val", **result} == records(output_dir, "val")[-1]
    assert all(0 < result[name] <= 1 for name in SCORES)
    assert result["num_valid_queries"] == result["num_queries"] > 0


def test_log_file_contains_console_output(first, output_dir):
    logged = (output_dir / "log.txt").read_text()
    printed = first.out.splitlines()
    assert printed[-1].startswith("best mAP")
    assert all(f" {line}\n" in logged for line in printed if line.startswith(("training", "epoch", "best", "W&B")))


def test_run_leaves_last_two_and_best_checkpoint_and_known_files(first, output_dir):
    best_epoch, best = max(enumerate(records(output_dir, "val"), 1), key=lambda item: item[1]["mAP"])
    assert names(output_dir / "checkpoints") == [
        f"best_{best_epoch:04d}_mAP_{best['mAP']:.4f}.pt",
        "last_0001_00000002.pt",
        "last_0002_00000004.pt",
    ]
    assert names(output_dir) == [
        *("checkpoints", "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "owner.json"),
        *("per_query.csv", "pictures", "result.json", "wandb", "wandb_run_id"),
    ]


def test_nothing_is_written_into_the_users_home(first, place):
    files = [file for file in (place.folder / "home").rglob("*") if file.is_file()]
    assert [file for file in files if ".onnxruntime" not in file.parts] == []  # which an export of another test may use


# ---- its W&B run ----


@pytest.fixture(scope="module")
def wandb_records(first, place, output_dir) -> list[dict]:
    return place.wandb_records(output_dir)


def rows(wandb_records: list[dict], number: str) -> list[dict]:
    """Return the rows with this number; pictures and tables have other rows."""
    history = [record["history"]["item"] for record in wandb_records if record["type"] == "history"]
    return [row for row in history if number in row]


def test_one_wandb_run_for_all_ranks_under_the_id_on_disk(first, output_dir):
    (file,) = output_dir.glob("**/run-*.wandb")
    assert file.stem == f"run-{(output_dir / 'wandb_run_id').read_text().strip()}"


def test_wandb_has_every_training_and_validation_row(wandb_records, output_dir):
    for row, record in zip(rows(wandb_records, "train/loss"), records(output_dir, "train"), strict=True):
        logged = {name.removeprefix("train/"): value for name, value in row.items() if not name.startswith("_")}
        assert logged == pytest.approx({name: value for name, value in record.items() if name != "kind"})
    best = 0.0
    for row, record in zip(rows(wandb_records, "val/mAP"), records(output_dir, "val"), strict=True):
        best = max(best, record["mAP"])
        assert (row["val/mAP"], row["val/mAP_best"]) == pytest.approx((record["mAP"], best))
        assert [row[f"val/cmc_rank_{k}"] for k in (1, 5, 10)] == pytest.approx(
            [record[f"rank-{k}"] for k in (1, 5, 10)]
        )
        assert (row["epoch"], row["iteration"]) == (record["epoch"], record["iteration"])


def test_wandb_receives_pictures(wandb_records, output_dir):
    keys = {name for record in wandb_records if record["type"] == "history" for name in record["history"]["item"]}
    for shown in ("train/batch", "val/random_queries", "val/worst_queries", "val/AP_per_query"):
        assert [key for key in keys if key.startswith(shown)], keys


def test_wandb_drops_no_row(wandb_records, output_dir):
    (log,) = output_dir.glob("wandb/offline-run-*/logs/debug-internal.log")
    assert "ignoring partial history" not in log.read_text()


def test_wandb_axes_are_iteration_for_train_and_epoch_for_val(wandb_records):
    metrics = [record["metric"] for record in wandb_records if record["type"] == "metric"]
    axes = {metric["glob_name"]: metric["step_metric"] for metric in metrics if "glob_name" in metric}
    assert axes == {"train/*": "iteration", "val/*": "epoch", "test/*": "epoch"}


def test_wandb_records_settings_world_size_and_exit_code(wandb_records, output_dir):
    (run,) = [record["run"] for record in wandb_records if record["type"] == "run"]
    config = run["config"]["update"]
    settings = json.loads(json.dumps(as_plain_dict(load_config(str(output_dir / "config.yaml"), []))))
    assert {name: config[name] for name in settings} == settings
    environment = json.loads((output_dir / "environment.json").read_text())
    assert {name: config[name] for name in ("world_size", "commit", "versions")} == {
        name: environment[name] for name in ("world_size", "commit", "versions")
    }
    assert config["world_size"] == 2
    assert len(config["dataset"]) == 64
    assert wandb_records[-1]["exit"]["exit_code"] == 0


# ---- its evaluation ----


@pytest.fixture(scope="module")
def best(first, output_dir) -> tuple[Path, float]:
    """Return the best checkpoint and the mAP that training reported for it."""
    (file,) = output_dir.glob("checkpoints/best_*.pt")
    return file, max(record["mAP"] for record in records(output_dir, "val"))


def test_evaluation_of_best_checkpoint_equals_training_score(place, best):
    file, reported = best
    ended = place.run("evaluate", "TEST.WEIGHT", file, "OUTPUT_DIR", "evaluated", num_ranks=2)
    assert [rank.code for rank in ended] == [0, 0]
    assert [rank.out.count(f"{100 * reported:.1f} %") for rank in ended] == [1, 0]
    result = json.loads((place.folder / "evaluated" / "result.json").read_text())
    assert result["mAP"] == pytest.approx(reported, abs=1e-9)
    assert result["weight"] == str(file)
    assert result["epoch"] == int(file.name.split("_")[1])


def test_evaluation_runs_on_ranks_that_do_not_divide_the_batch(place, best):
    file, reported = best
    ended = place.run("evaluate", "TEST.WEIGHT", file, "OUTPUT_DIR", "evaluated_by_three", num_ranks=3)
    assert [(rank.code, rank.err) for rank in ended] == [(0, "")] * 3
    result = json.loads((place.folder / "evaluated_by_three" / "result.json").read_text())
    assert result["mAP"] == pytest.approx(reported, abs=1e-6)


def test_evaluation_on_one_process_equals_that_on_two(place, best):
    file, reported = best
    (ended,) = place.run("evaluate", "TEST.WEIGHT", file, "OUTPUT_DIR", "evaluated_by_one")
    assert (ended.code, ended.err) == (0, "")
    result = json.loads((place.folder / "evaluated_by_one" / "result.json").read_text())
    assert result["mAP"] == pytest.approx(reported, abs=1e-6)


ALL_SCORES = ("TEST.FPR", "[0.01,0.5]", "TEST.FLIP", "yes", "TEST.SINGLE_GALLERY_SHOT", "yes")


def test_all_scores_are_equal_on_one_and_two_processes(place, best):
    file, reported = best
    outcomes = []
    for num_ranks in (1, 2):
        settings = ("TEST.WEIGHT", file, "OUTPUT_DIR", f"scored_by_{num_ranks}", *ALL_SCORES)
        first, *others = place.run("evaluate", *settings, num_ranks=num_ranks)
        assert (first.code, first.err, [other.out for other in others]) == (0, "", [""] * (num_ranks - 1))
        folder = place.folder / f"scored_by_{num_ranks}"
        with (folder / "per_query.csv").open(encoding="utf-8", newline="") as rows:
            outcomes.append((json.loads((folder / "result.json").read_text()), list(csv.DictReader(rows)), first.out))
    (alone, rows, output), (shared, shared_rows, _) = outcomes
    assert shared == pytest.approx(alone, abs=1e-6)
    assert alone["mAP"] != pytest.approx(reported, abs=1e-6)  # because of the mirror images
    assert {"TPR@FPR=0.01", "TPR@FPR=0.5"} < alone.keys()
    assert f"TPR@FPR=0.5 {100 * alone['TPR@FPR=0.5']:.1f} %" in output
    assert [row["path"] for row in shared_rows] == [row["path"] for row in rows]
    assert all(Path(row["path"]).name.startswith(f"{int(row['pid']):04d}_") for row in rows)
    precisions = [[float(row["AP"]) for row in table] for table in (rows, shared_rows)]
    assert precisions[1] == pytest.approx(precisions[0], abs=1e-6)
    assert sum(precisions[0]) / len(rows) == pytest.approx(alone["mAP"], rel=1e-12)
    cameras = [line.split() for line in output.splitlines() if re.match(r"camid|\d+ ", line)]
    assert cameras[0] == ["camid", "queries", "valid", "mAP", "rank-1"]
    assert [int(camera[0]) for camera in cameras[1:]] == sorted({int(row["camid"]) for row in rows})
    assert sum(int(camera[1]) for camera in cameras[1:]) == len(rows) == alone["num_queries"]


# ---- the same command again ----


@pytest.fixture(scope="module")
def again(place, first, output_dir) -> tuple[Path, Ended]:
    folder = place.folder / "again"
    shutil.copytree(output_dir, folder, symlinks=True)
    return folder, place.train("OUTPUT_DIR", "again", "WANDB.ENABLE", "yes", num_ranks=2)


def test_restart_of_finished_training_changes_nothing(again, output_dir):
    folder, ended = again
    assert re.search(r"\ball 2 epochs\b.*SOLVER\.MAX_EPOCHS", ended.out)
    changing = ("log.txt", "owner.json")  # written by each start
    before = [file for file in output_dir.rglob("*") if file.is_file() and file.name not in changing]
    assert {file.relative_to(output_dir): file.read_bytes() for file in before} == {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in changing
    }


def test_restart_with_fewer_epochs_has_nothing_left_to_do(place, again):
    ended = place.train("OUTPUT_DIR", "again", "WANDB.ENABLE", "yes", "SOLVER.MAX_EPOCHS", 1, num_ranks=2)
    assert re.search(r"\ball 1 epochs\b.*SOLVER\.MAX_EPOCHS", ended.out)


def test_resume_skips_invalid_lines_in_metrics_file(place, output_dir, first):
    folder = place.folder / "garbage"
    shutil.copytree(output_dir, folder, symlinks=True)
    complete = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("\0garbage\n{}\n" + complete + '{"kind": "tra')
    ended = place.train("OUTPUT_DIR", "garbage", "WANDB.ENABLE", "yes", num_ranks=2)
    assert re.search(r"^warning: .*garbage/metrics\.jsonl", ended.out, re.MULTILINE)
    assert (folder / "metrics.jsonl").read_text() == complete


@pytest.fixture(scope="module")
def longer(place, again) -> tuple[Path, Ended]:
    folder, _ = again
    settings = ("SOLVER.MAX_EPOCHS", 3, "WANDB.ENABLE", "yes")
    return folder, place.train("OUTPUT_DIR", "again", *settings, num_ranks=2)


def test_more_epochs_resume_a_finished_training(longer, output_dir):
    folder, ended = longer
    assert "epoch 2, step 2 of 2" in ended.out
    steps = [record["iteration"] for record in records(folder, "train")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records(folder, "val")] == [1, 2, 3]
    assert (folder / "log.txt").read_text().startswith((output_dir / "log.txt").read_text())
    assert load_config(str(folder / "config.yaml"), []).SOLVER.MAX_EPOCHS == 3
    assert [name for name in names(folder / "checkpoints") if name.startswith("last")] == [
        "last_0002_00000004.pt",
        "last_0003_00000006.pt",
    ]


def test_resume_continues_the_same_wandb_run(longer, output_dir):
    folder, ended = longer
    run_id = (output_dir / "wandb_run_id").read_text().strip()
    assert f"W&B: continuing run {run_id}" in ended.out
    assert [file.stem for file in folder.glob("**/run-*.wandb")] == [f"run-{run_id}"] * 2


# ---- its data ----


def test_unreadable_images_of_all_splits_are_reported_at_once(place):
    place.train("OUTPUT_DIR", "readable", "SOLVER.MAX_EPOCHS", 1)
    root = place.folder / "unreadable"
    shutil.copytree(place.folder / "data" / "synthetic", root / "market1501")
    train = sorted((root / "market1501" / "bounding_box_train").glob("*.jpg"))[:25]
    query = min((root / "market1501" / "query").glob("*.jpg"))
    for file in (*train, query):
        file.write_bytes(b"nothing")
    settings = ("DATASETS.NAMES", "market1501", "DATASETS.ROOT_DIR", root.name, "OUTPUT_DIR", "unread")
    message = place.refusal("train", *settings, num_ranks=2, code=2)
    assert "25 of 51" in message
    assert f"{query.name} (" in message
    list_file = Path(re.search(r"\b5 more\b.* (\S+\.txt)", message)[1])
    listed = (place.folder / list_file).read_text()
    assert all(file.name in listed for file in train)


# ---- started in other ways ----


@pytest.mark.slow
def test_under_torchrun_in_a_slurm_job(place, output_dir, first):
    """Start it as the README does; the rest of this file forks the ranks."""
    settings = ("--config_file", "tiny.yml", "WANDB.ENABLE", "yes", "OUTPUT_DIR", "by_torchrun")
    ended = place.command(*TORCHRUN, TRAIN, *settings, environment=SLURM_JOB)
    assert (ended.code, ended.err) == (0, ""), ended
    assert not re.search("warning|traceback|deprecat", ended.out, re.IGNORECASE)
    assert ended.out.count(f"training {SMALL}") == 1  # by one of two ranks
    folder = place.folder / "by_torchrun"
    assert records(folder, "train", speeds=False) == records(output_dir, "train", speeds=False)
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "flag"), [(2, "--multi_gpu"), (1, "--cpu")])
def test_under_accelerates_launcher(place, num_ranks, flag):
    output_dir = f"accelerate_{num_ranks}"
    flags = ["--num_processes", num_ranks, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = ("accelerate", "launch", flag, *flags, "--num_cpu_threads_per_process", 1)
    settings = ("--config_file", "tiny.yml", "OUTPUT_DIR", output_dir, "SOLVER.MAX_EPOCHS", 1)
    ended = place.command(*launcher, TRAIN, *settings)
    assert (ended.code, ended.err) == (0, "")
    environment = json.loads((place.folder / output_dir / "environment.json").read_text())
    assert environment["world_size"] == num_ranks
