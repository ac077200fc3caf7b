"""Person re-identification: the same result on any number of ranks, continued after any interruption.

The map, in reading order. Mathematics are pure functions on tensors and arrays that know no rank, settings or logger;
assembly builds, gathers and wires.

    the spine
    errors.py                   errors written for the user
    world.py                    what the launcher told this process about ranks
    environment_file.py         variables from .env
    config/schema.py            every setting by its full key, in order
    config/schema_model.py      default, validator and documentation of: SEED, OUTPUT_DIR, MODEL
    config/schema_data.py       the same of INPUT, DATASETS, DATALOADER
    config/schema_solver.py     the same of SOLVER
    config/schema_output.py     the same of TEST, LOG, WANDB
    config/load.py              from files and command lines to the frozen yacs tree, and back
    config/parsing.py           raw settings of files and command lines, and their literals
    config/validators.py        validators of single settings
    config/rules.py             losses that the settings choose, and combinations that are errors
    config/benchmark_names.py   what a benchmark may be called, and in which forms it comes
    commands.py                 what each command takes besides settings
    settings_command.py         the command that prints the settings with their documentation
    launcher.py                 from the command line to a running story
    sweeps.py                   searches for settings, by W&B
    logs.py                     where lines go, and what happens where they cannot
    preemption.py               signals that ask a run to stop
    distributed.py              everything that knows there is more than one process
    hardware.py                 what this machine's processor can do
    wrapping.py                 precision and wrapping, by accelerate
    sync_batchnorm.py           BatchNorm over the global batch
    start.py                    what is found out before a run builds anything
    training/train.py           the run of a training
    training/build.py           the assembly of a training: model, optimizer, trainer
    training/step.py            the train step, and the gradient of a global batch in parts
    evaluate_command.py         the command evaluate
    embedder.py                 embeddings of batches and of image files
    model_file.py               a trained model for programs that embed in one process
    api.py                      train and evaluate as functions
    data/preprocessing.py       from batches in host memory to the input of the model
    preflight.py                the check story: what a training would find, problems first
    link_speed.py               how fast collectives are between ranks and nodes
    trial_steps.py              the first steps of a training, timed
    handlers/records.py         what there is to write down, and the events that say so
    handlers/side_effects.py    guard around pictures, W&B and TensorBoard
    handlers/schedule.py        learning rate, sampler's place, when to evaluate
    handlers/meters.py          means over steps, equal on all ranks; the non-finite stop
    handlers/guards.py          the first batch is what was planned
    handlers/console.py         lines, progress bar, metrics.jsonl, result.json
    handlers/checkpoint.py      last_*.pt and best_*.pt; resume
    handlers/interruption.py    saving by the clock and because of a signal, at an agreed step
    handlers/watchdog.py        the end of a run in which a rank hangs
    handlers/tensorboard.py     TensorBoard
    handlers/pictures.py        the first batch, ranked queries and CMC curves as PNG files
    handlers/tracking.py        what a run records in Weights & Biases
    handlers/artifacts.py       data sets, checkpoints, images and tables at W&B
    handlers/wandb_session.py   where W&B records, and what happens where it fails
    handlers/wandb_jobs.py      queue of upload tasks, which wait for the server
    handlers/wandb_pieces.py    run segments on disk, and which of them W&B lacks
    handlers/wandb_process.py   the process of W&B, which must not outlive the training
    run_directory.py            the files of a run
    ownership.py                which start of a training may write them
    checkpoint_files.py         files that are whole or absent, written in the background

    the use of a trained model
    weight_file.py              the file that TEST.WEIGHT names, on the disk or at W&B
    trained.py                  the model in TEST.WEIGHT
    recorded.py                 the settings that a checkpoint or a gallery was made with
    embedding.py                the story of a folder of images that becomes a gallery
    gallery.py                  its files
    search.py                   the story of images that are looked for in it
    export.py                   the story of a model that leaves for other programs
    export_checks.py            whether it still computes the same
    safetensors_files.py        checkpoints that cannot run code
    whole_files.py              files that appear whole

    the parts
    data/benchmarks.py          name -> train, query, gallery
    data/splits.py              what these are, and what all readers share
    data/folders.py             Market-1501, DukeMTMC-reID, Occluded-Duke, VeRi-776
    data/lists.py               MSMT17, VehicleID
    data/cuhk03.py              CUHK03, from its .mat file or extracted
    data/tables.py              any CSV or Parquet table
    data/sources.py             where each comes from, how it lies on disk, its documented numbers
    data/synthetic.py           a generated benchmark of people in the Market-1501 layout
    data/people.py              how its people look
    data/photographs.py         how its cameras see them
    data/store.py               images decoded and resized once, memory-mapped
    data/large_files.py         large files that appear whole, and copies of them
    data/randomness.py          random numbers as a pure function of integers
    data/samplers.py            the global batch of (seed, epoch, step), and this rank's part
    data/augment.py             whole uint8 batches to normalised float batches on the device
    data/sets.py                the benchmarks that the settings name, several training sets as one (assembly)
    data/loaders.py             this rank's batches, loaded ahead by a thread (assembly)
    data_check.py               what is wrong with the benchmarks on disk
    backbones.py                trunks, a plain dict by name
    timm_models.py              any other trunk that timm has
    model.py                    backbone, pooling, BNNeck, classifier, centers
    layouts.py                  what the names in a file of weights say of its model (mathematics)
    imagenet.py                 where ImageNet weights lie or come from
    weights.py                  weights from files, with a report
    conversion.py               the weights of whole pickled models (launch/convert.py)
    losses.py                   identity, batch-hard triplet, center (mathematics)
    criterion.py                which losses, over the global batch (assembly)
    optim.py                    parameter groups, optimiser, learning rate by the epoch
    distances.py                distances of embeddings, block by block (mathematics)
    metrics.py                  CMC, mAP, mINP (mathematics)
    ranking.py                  the positions of the matches, by counting
    verification.py             TPR at FPR over all pairs
    single_shot.py              CUHK03's protocol of one gallery image of each identity
    tables_text.py              tables of plain text
    per_query.py                the scores of every query as rows, of every camera as a table
    neighbours.py               exact nearest neighbours among N images, or of queries in a gallery (mathematics)
    reranking.py                k-reciprocal re-ranking, sparse (mathematics)
    examples.py                 which queries to look at, and what they find (mathematics)
    pictures.py                 batches, rankings and CMC curves drawn (mathematics)
    evaluation.py               embeddings of all ranks to scores (assembly)
    summarize.py                mean and spread of several runs

Letters in shape comments: B batch, C training identities (or channels), D feature, G gallery, H height, K images per
identity, N data set, P identities in a batch, Q queries, T batches in an epoch, W width (or the number of ranks).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reid.api import evaluate, train
    from reid.config.load import load_config
    from reid.embedder import Embedder
    from reid.losses import batch_hard_triplet, center_loss, label_smoothed_cross_entropy
    from reid.metrics import retrieval_scores, scores_from_distmat
    from reid.model import build_model
    from reid.model_file import load_model
    from reid.optim import learning_rate
    from reid.reranking import k_reciprocal

# Imported when first used, as torch takes seconds.
_MODULES = {
    "Embedder": "reid.embedder",
    "batch_hard_triplet": "reid.losses",
    "build_model": "reid.model",
    "center_loss": "reid.losses",
    "evaluate": "reid.api",
    "k_reciprocal": "reid.reranking",
    "label_smoothed_cross_entropy": "reid.losses",
    "learning_rate": "reid.optim",
    "load_config": "reid.config.load",
    "load_model": "reid.model_file",
    "retrieval_scores": "reid.metrics",
    "scores_from_distmat": "reid.metrics",
    "train": "reid.api",
}

__all__ = [
    "Embedder",
    "batch_hard_triplet",
    "build_model",
    "center_loss",
    "evaluate",
    "k_reciprocal",
    "label_smoothed_cross_entropy",
    "learning_rate",
    "load_config",
    "load_model",
    "retrieval_scores",
    "scores_from_distmat",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'reid' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
