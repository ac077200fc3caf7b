"""Data sets, checkpoints, images and tables at W&B: logged, referenced and fetched; for rank 0."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reid.errors import SettingsError, WorldError
from reid.process.side_effects import error_summary
from reid.runs.progress import SavedCheckpoint
from reid.tracking.offline import KEPT
from reid.tracking.service import Service

if TYPE_CHECKING:
    import wandb

    from reid.evaluation.ranked_galleries import Figure, Table

_FETCHED = Path("wandb", "checkpoints")  # in the run directory: checkpoints fetched from W&B
_TYPES = {"best": "model", "last": "checkpoint"}
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.-]+")  # in an artifact's name


def name_of(config: Mapping[str, Any], run_id: str, kind: str) -> str:
    """Return the artifact name of a run's checkpoints of one kind; no two runs share a name, nor its aliases."""
    title = config["WANDB"]["NAME"] or "-".join([*config["DATASETS"]["NAMES"], config["MODEL"]["NAME"]])
    name = _FORBIDDEN.sub("_", f"{title}-{run_id}")[-100:]
    return name if kind == "best" else f"{name}-{kind}"


def keep_checkpoint(saved: SavedCheckpoint, name: str, facts: Mapping[str, Any], segment: Path) -> Path:
    """Return a hard link to the checkpoint for W&B, which may read it long after rotation has removed the file.

    A note in the same folder has the artifact's name and metadata, so that a later process can log it too.
    """
    kept = (segment / KEPT).absolute() / saved.file.name
    kept.parent.mkdir(exist_ok=True)
    kept.unlink(missing_ok=True)
    try:
        os.link(saved.file, kept)
    except OSError:  # a file system without hard links
        shutil.copyfile(saved.file, kept)
    metadata = {**saved.facts, **facts, "kind": saved.kind}
    _note_of(kept).write_text(json.dumps({"name": name, "metadata": metadata}), encoding="utf-8")
    return kept


def _note_of(kept: Path) -> Path:
    """Return the note of a kept file, which exists until W&B has the file."""
    return kept.with_suffix(".json")


def unlogged_checkpoints(folder: Path, run_id: str) -> list[Path]:
    """Return the checkpoints of this run that killed processes have kept and W&B does not have, the oldest first."""
    notes = (folder / "wandb").glob(f"*run-*-{glob.escape(run_id)}/{KEPT}/*.json")
    return [note.with_suffix(".pt") for note in sorted(notes) if note.with_suffix(".pt").exists()]


def log_checkpoint(run: wandb.Run, kept: Path) -> None:
    """Log a checkpoint as the newest version of its artifact; return when W&B has it, or it is recorded offline.

    The kept file is removed once W&B has it.
    """
    import wandb

    if not _note_of(kept).exists():  # W&B got it after its time limit
        return
    note = json.loads(_note_of(kept).read_text(encoding="utf-8"))
    kind, epoch = note["metadata"]["kind"], note["metadata"]["epoch"]
    metadata = note["metadata"] | {"run_id": run.id, "sha256": sha256(kept)}
    artifact = wandb.Artifact(note["name"], type=_TYPES[kind], metadata=metadata)
    artifact.add_file(str(kept), policy="immutable", skip_cache=True)  # "mutable" would copy the file
    run.log_artifact(artifact, aliases=["latest", kind, f"epoch-{epoch}"])
    if not run.offline:
        artifact.wait()
        kept.unlink(missing_ok=True)
    _note_of(kept).unlink(missing_ok=True)


def log_image(run: wandb.Run, image: Figure, position: dict[str, int]) -> None:
    """Log an image file, which may change after the call."""
    import wandb

    run.log({image.key: [wandb.Image(str(image.file), caption=image.caption)], **position})


def log_table(run: wandb.Run, table: Table, position: dict[str, int]) -> None:
    """Log a table, or a line chart of it; return when W&B has it, or it is recorded offline.

    W&B keeps each table as an artifact. Online, it writes tables to no file from which they could be sent later.
    """
    import wandb

    content = wandb.Table(columns=list(table.columns), data=table.rows)
    x, y = table.columns[:2]
    chart = wandb.plot.line(content, x, y, title=table.chart_title) if table.chart_title else content
    run.log({table.key: chart, **position})
    if not run.offline:
        assert content._artifact_target is not None  # since it was logged
        content._artifact_target.artifact.wait()


def use_data_set(run: wandb.Run, name: str, fingerprint: str, seconds: float) -> None:
    """Record that the run uses a data set; the same images are the same version of its artifact.

    Offline runs cannot use artifacts; their configuration has the fingerprint.
    """
    import wandb

    if run.offline:
        return
    facts = {"name": name, "fingerprint": fingerprint}
    artifact = wandb.Artifact(_FORBIDDEN.sub("_", name), type="dataset", metadata=facts)
    with artifact.new_file("dataset.json") as stream:
        stream.write(json.dumps(facts, indent=2) + "\n")
    run.log_artifact(artifact)
    run.use_artifact(artifact.wait(timeout=max(1, round(seconds))))


def use_checkpoint(run: wandb.Run, reference: str, file: Path) -> None:
    """Record that the run uses a checkpoint, if W&B has exactly this file as [ENTITY/]PROJECT/NAME:ALIAS."""
    import wandb

    if run.offline or not wandb.Api().artifact_exists(reference):
        return
    artifact = wandb.Api().artifact(reference)
    if artifact.metadata.get("sha256") == sha256(file):
        run.use_artifact(artifact)


def reference_of(content: Mapping[str, Any]) -> str:
    """Return the reference of a checkpoint's artifact, if its run has logged it; empty for a foreign file."""
    config, epoch, run_id = (content.get(name) for name in ("config", "epoch", "wandb_run_id"))
    if not (isinstance(config, str) and isinstance(epoch, int) and isinstance(run_id, str) and run_id):
        return ""
    settings = yaml.safe_load(config)
    project, entity = settings["WANDB"]["PROJECT"], settings["WANDB"]["ENTITY"]
    kind = "last" if "optimizer" in content else "best"
    return f"{entity + '/' if entity else ''}{project}/{name_of(settings, run_id, kind)}:epoch-{epoch}"


_fetched: dict[str, Path] = {}  # by this process, which asks again once it knows the checkpoint's OUTPUT_DIR


def fetch(value: str, folder: Path) -> Path:
    """Download a checkpoint from W&B and return its file.

    Args:
        value: TEST.WEIGHT, in the form wandb:ENTITY/PROJECT/NAME:ALIAS.
        folder: Run directory, which receives the file.

    Raises:
        SettingsError: The value has another form.
        WorldError: W&B does not provide it.
    """
    if value not in _fetched:
        _fetched[value] = _download(value, folder)
    return _fetched[value]


def _download(value: str, folder: Path) -> Path:
    import wandb

    if not re.fullmatch(r"wandb:[^/:]+/[^/:]+/[^/:]+:[^/:]+", value):
        raise SettingsError(
            f"TEST.WEIGHT must be a file or wandb:ENTITY/PROJECT/NAME:ALIAS, got {value!r}. Fix: use for example "
            "wandb:me/reid-strong-baseline/market1501-resnet50-1a2b3c4d:best.",
            key="TEST.WEIGHT",
        )
    service = Service()
    service.start(folder)
    try:
        artifact = wandb.Api().artifact(value.removeprefix("wandb:"))
        target = folder / _FETCHED / artifact.name.replace(":", "-")
        artifact.download(root=str(target), skip_cache=True)
    except Exception as error:  # of requests, sockets, pydantic and wandb, whose WandbApiFailedError is private
        raise WorldError(
            f"TEST.WEIGHT must be available at W&B, got {value}: {error_summary(error)}. Fix: correct the name, check "
            "the key (wandb login) and the network, or use a file.",
            key="TEST.WEIGHT",
        ) from error
    finally:
        service.end()
    files = sorted(target.glob("*.pt"))
    if len(files) != 1 or sha256(files[0]) != artifact.metadata.get("sha256", sha256(files[0])):
        raise WorldError(
            f"TEST.WEIGHT must be an artifact with one complete checkpoint, got {value}. Fix: use another one.",
            key="TEST.WEIGHT",
        )
    return Path(files[0])


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as sha256sum prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
