"""Data sets and checkpoints as W&B artifacts: made, found again and fetched; for rank 0."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reid.errors import SettingsError, WorldError
from reid.handlers.records import SavedCheckpoint
from reid.handlers.wandb_jobs import in_short
from reid.handlers.wandb_pieces import keep
from reid.handlers.wandb_process import Service

if TYPE_CHECKING:
    import wandb

_FETCHED = Path("wandb", "checkpoints")  # in the run's folder: what was fetched from W&B
_TYPES = {"best": "model", "last": "checkpoint"}
_NO_LETTER = re.compile(r"[^A-Za-z0-9_.-]+")  # in an artifact's name


def name_of(config: Mapping[str, Any], run_id: str, kind: str) -> str:
    """What the checkpoints of a run are called at W&B.

    Args:
        config: the whole configuration of the run that made them.
        run_id: of that run, so that the aliases of one run stay its own.
        kind: best or last; they differ in what they hold.
    """
    given = config["WANDB"]["NAME"] or "-".join([*config["DATASETS"]["NAMES"], config["MODEL"]["NAME"]])
    name = _NO_LETTER.sub("_", f"{given}-{run_id}")[-100:]
    return name if kind == "best" else f"{name}-{kind}"


def keep_checkpoint(saved: SavedCheckpoint, name: str, facts: Mapping[str, Any], piece: Path) -> Path:
    """The file as W&B will read it, with all that `log_checkpoint` needs beside it: a later process can log it too.

    Args:
        saved: the checkpoint.
        name: of its artifact.
        facts: of the run.
        piece: folder of what this process records of the run.
    """
    kept = keep(saved.file, piece)
    metadata = {**saved.facts, **facts, "kind": saved.kind}
    _note_of(kept).write_text(json.dumps({"name": name, "metadata": metadata}), encoding="utf-8")
    return kept


def _note_of(kept: Path) -> Path:
    """It stands there as long as W&B knows nothing of the file."""
    return kept.with_suffix(".json")


def unlogged_checkpoints(folder: Path, run_id: str) -> list[Path]:
    """What killed processes have kept of this run, and W&B knows nothing of; the oldest first."""
    notes = (folder / "wandb").glob(f"*run-*-{glob.escape(run_id)}/checkpoints/*.json")
    return [note.with_suffix(".pt") for note in sorted(notes) if note.with_suffix(".pt").exists()]


def log_checkpoint(run: wandb.Run, kept: Path) -> None:
    """The checkpoint as the newest version of its artifact; returns when W&B has it, or it is recorded offline.

    Args:
        run: which has made it.
        kept: its file, which is removed once W&B has it.
    """
    import wandb

    if not _note_of(kept).exists():  # it has arrived after all, after its time was up
        return
    note = json.loads(_note_of(kept).read_text(encoding="utf-8"))
    kind, epoch = note["metadata"]["kind"], note["metadata"]["epoch"]
    metadata = note["metadata"] | {"run_id": run.id, "sha256": sha256(kept)}
    artifact = wandb.Artifact(note["name"], type=_TYPES[kind], metadata=metadata)
    # Immutable: W&B reads this very file, and makes no copy of it.
    artifact.add_file(str(kept), policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=["latest", kind, f"epoch-{epoch}"])
    if not run.offline:
        artifact.wait()
        kept.unlink(missing_ok=True)
    _note_of(kept).unlink(missing_ok=True)


def log_table(run: wandb.Run, row: dict[str, Any], table: wandb.Table) -> None:
    """A row with a table, or with a chart of it; returns when W&B has it, or it is recorded offline.

    W&B keeps a table as an artifact. Online it writes those to no file from which they could be sent later.
    """
    run.log(row)
    if not run.offline:
        assert table._artifact_target is not None  # since it was logged
        table._artifact_target.artifact.wait()


def use_data_set(run: wandb.Run, name: str, fingerprint: str, *, seconds: float) -> None:
    """Says that the run has used a data set; the same images are the same version, whoever says it.

    Offline nothing can be used; there the run's configuration has the fingerprint.

    Args:
        run: which uses it.
        name: of the data set.
        fingerprint: of its images.
        seconds: to wait for W&B to take it.
    """
    import wandb

    if run.offline:
        return
    facts = {"name": name, "fingerprint": fingerprint}
    artifact = wandb.Artifact(_NO_LETTER.sub("_", name), type="dataset", metadata=facts)
    with artifact.new_file("dataset.json") as stream:
        stream.write(json.dumps(facts, indent=2) + "\n")
    run.log_artifact(artifact)
    run.use_artifact(artifact.wait(timeout=max(1, round(seconds))))


def use_checkpoint(run: wandb.Run, reference: str, digest: str) -> None:
    """Says that the run has used a checkpoint, if W&B has the very one.

    Args:
        run: which uses it.
        reference: [ENTITY/]PROJECT/NAME:ALIAS.
        digest: SHA-256 of its file.
    """
    import wandb

    if run.offline or not wandb.Api().artifact_exists(reference):
        return
    artifact = wandb.Api().artifact(reference)
    if artifact.metadata.get("sha256") == digest:
        run.use_artifact(artifact)


def reference_of(content: Mapping[str, Any]) -> str:
    """Where W&B has one of our checkpoints, if its run has logged it; empty for a file of others.

    Args:
        content: of the file.
    """
    config, epoch, run_id = (content.get(name) for name in ("config", "epoch", "wandb_run_id"))
    if not (isinstance(config, str) and isinstance(epoch, int) and isinstance(run_id, str) and run_id):
        return ""
    settings = yaml.safe_load(config)
    project, entity = settings["WANDB"]["PROJECT"], settings["WANDB"]["ENTITY"]
    kind = "last" if "optimizer" in content else "best"
    return f"{entity + '/' if entity else ''}{project}/{name_of(settings, run_id, kind)}:epoch-{epoch}"


_fetched: dict[str, Path] = {}  # by this process, which may ask for it more than once


def fetch(value: str, folder: Path) -> Path:
    """The file of a checkpoint at W&B.

    Args:
        value: of TEST.WEIGHT: wandb:ENTITY/PROJECT/NAME:ALIAS.
        folder: of the run, to put it into.

    Raises:
        SettingsError: it is no such name.
        WorldError: W&B does not give it.
    """
    if value not in _fetched:
        _fetched[value] = _fetch(value, folder)
    return _fetched[value]


def _fetch(value: str, folder: Path) -> Path:
    import wandb

    if not re.fullmatch(r"wandb:[^/:]+/[^/:]+/[^/:]+:[^/:]+", value):
        raise SettingsError(
            f"TEST.WEIGHT must be a file or wandb:ENTITY/PROJECT/NAME:ALIAS, got {value!r}; use for example "
            "wandb:me/reid-strong-baseline/market1501-resnet50-1a2b3c4d:best",
            key="TEST.WEIGHT",
        )
    service = Service()
    service.start(folder)
    try:
        artifact = wandb.Api().artifact(value.removeprefix("wandb:"))
        into = folder / _FETCHED / artifact.name.replace(":", "-")
        artifact.download(root=str(into), skip_cache=True)
    except Exception as error:  # of wandb's own, pydantic's, and others
        raise WorldError(
            f"TEST.WEIGHT={value} cannot be fetched from W&B: {in_short(error)}; correct the "
            "name, see that there is a key (wandb login) and a network, or give a file",
            key="TEST.WEIGHT",
        ) from error
    finally:
        service.end()
    files = sorted(into.glob("*.pt"))
    if len(files) != 1 or sha256(files[0]) != artifact.metadata.get("sha256", sha256(files[0])):
        raise WorldError(
            f"TEST.WEIGHT={value} must hold one checkpoint, whole, but it does not; give another one", key="TEST.WEIGHT"
        )
    return Path(files[0])


def sha256(file: Path) -> str:
    """Of the file, as sha256sum prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
