"""Work of the ranks of test_collectives.py: they train and evaluate in float64, and save the outcome."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from golden_weights import fill
from ignite.engine import Events
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reid.checkpoints.save import host_copy
from reid.checkpoints.weights import load_state
from reid.config.load import load_config
from reid.data import augment
from reid.data.loaders import Batch, BatchLoader, StoredImages, TestData
from reid.data.preprocessing import BatchPreprocessor
from reid.data.samplers import EvaluationBatches, IdentityPlan, ShufflePlan, TrainBatches
from reid.distributed import collectives
from reid.distributed.accelerator import fsdp_plugin, full_tensors, load_optimizer, move_model
from reid.distributed.launch_environment import read_world
from reid.distributed.session import session
from reid.distributed.sync_batchnorm import synchronize_batchnorm
from reid.errors import DataError, WorldError
from reid.evaluation.evaluator import Evaluator
from reid.models.backbones import BACKBONES, IBN
from reid.models.reid_model import build_model
from reid.retrieval import metrics, neighbours
from reid.retrieval.metrics import Labels
from reid.training import schedule
from reid.training.build import build_training

GOLDEN = Path(__file__).parent / "golden"
BASE = [
    "MODEL.NAME=resnet18",
    "MODEL.DEVICE=cpu",
    "SOLVER.PRECISION=fp64",
    "SOLVER.IMS_PER_BATCH=16",
    "INPUT.PADDING=2",
]
BASE += ["INPUT.SIZE_TRAIN=(32,16)", "INPUT.SIZE_TEST=(32,16)", "SOLVER.WARMUP_ITERS=3", "SOLVER.STEPS=(4,7)"]

TRAJECTORIES = {
    "adam_center": ["MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=triplet_center"],
    "sgd": ["SOLVER.OPTIMIZER_NAME=SGD", "SOLVER.BIAS_LR_FACTOR=2", "SOLVER.WEIGHT_DECAY_BIAS=0"],
}
# The configurations whose training must not depend on the number of ranks.
VARIANTS = {
    "softmax": ["DATALOADER.SAMPLER=softmax"],
    "triplet": ["DATALOADER.SAMPLER=triplet"],
    "triplet_soft_margin": ["DATALOADER.SAMPLER=triplet", "SOLVER.MARGIN=None"],
    "softmax_triplet": [],
    "softmax_triplet_no_neck": ["MODEL.NECK=no"],
    "softmax_triplet_center": TRAJECTORIES["adam_center"],
    "softmax_center_on_any_images": [
        *("DATALOADER.SAMPLER=softmax", "MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=triplet_center"),
    ],
    "frozen_batchnorm": ["MODEL.FREEZE_BN=yes"],
    "no_batchnorm": ["MODEL.NAME=resnet34", "MODEL.NECK=no"],
    "clipped": ["SOLVER.CLIP_GRAD_NORM=0.5"],
    "accumulated": ["SOLVER.ACCUMULATE=2"],
    "accumulated_center": [*TRAJECTORIES["adam_center"], "SOLVER.ACCUMULATE=4"],
    "accumulated_triplet_no_batchnorm": [
        *("MODEL.NAME=resnet34", "MODEL.NECK=no", "DATALOADER.SAMPLER=triplet", "SOLVER.ACCUMULATE=2"),
    ],
    "triplet_no_batchnorm": ["MODEL.NAME=resnet34", "MODEL.NECK=no", "DATALOADER.SAMPLER=triplet"],
    "accumulated_no_batchnorm": ["MODEL.NAME=resnet34", "MODEL.NECK=no", "SOLVER.ACCUMULATE=4"],
    "ibn": ["MODEL.NAME=resnet50_ibn_a"],
    "timm_batchnorm_with_activation": ["MODEL.NAME=timm/test_efficientnet", "SOLVER.OPTIMIZER_NAME=SGD"],
    "timm_vit": ["MODEL.NAME=timm/test_vit", "SOLVER.OPTIMIZER_NAME=SGD"],
}
# Trained also where each identity has as many images as a batch takes of it; unequal numbers are the general case.
EQUAL_COUNTS = ("softmax", "softmax_triplet", "clipped", "no_batchnorm", "accumulated_no_batchnorm")
EVALUATION_SIZES = (2, 7, 30, 61)  # images, in batches of 8: fewer batches than ranks, and fewer images
# Variants with equal results: one takes micro-batches, the other the global batch.
EQUAL_VARIANTS = {
    "accumulated_no_batchnorm": "no_batchnorm",
    "accumulated_triplet_no_batchnorm": "triplet_no_batchnorm",
}


class TinyBackbone(nn.Sequential):
    """Two strided convolutions with BatchNorm, so that many configurations can be trained in a moment."""

    num_features = 16

    def __init__(self, *, last_stride: int, stem_relu: bool) -> None:
        del last_stride, stem_relu
        layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16)]
        super().__init__(*layers)


class BackboneWithIBN(nn.Sequential):
    """Tiny backbone with half an InstanceNorm."""

    num_features = 16

    def __init__(self, *, last_stride: int, stem_relu: bool) -> None:
        del last_stride, stem_relu
        super().__init__(nn.Conv2d(3, 8, 3, 2), IBN(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16))


class BackboneWithoutBatchNorm(nn.Sequential):
    """Tiny backbone without BatchNorm."""

    num_features = 16

    def __init__(self, *, last_stride: int, stem_relu: bool) -> None:
        del last_stride, stem_relu
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))


class GivenImages(BatchPreprocessor):
    """Preprocessor of images that are already normalized."""

    def for_training(self, batch: Batch) -> Tensor:
        return batch.images


def built(accelerator: Any, cfg: Any) -> Any:
    """Return a model whose weights are made from names, on its device."""
    torch.manual_seed(0)
    model = build_model(cfg, num_pids=20)
    fill(model.double())
    move_model(model, cfg, accelerator.device)
    if cfg.SOLVER.SYNC_BN:
        synchronize_batchnorm(model)
    return model


def trained(
    accelerator: Any,
    cfg: Any,
    loader: Any,
    prepare: type[BatchPreprocessor],
    wire: Callable[..., None],
    num_epochs: int,
) -> dict[str, Any]:
    """Train a model; return it with its gradients and the values logged at every step."""
    model = built(accelerator, cfg)
    training = build_training(cfg, accelerator, model, prepare(cfg, accelerator.device))
    trainer, wrapped, optimizer = training.trainer, training.wrapped, training.optimizer
    schedule.set_learning_rate_by_epoch(trainer, optimizer, cfg.SOLVER)
    schedule.train_mode_by_epoch(trainer, wrapped)
    wire(trainer)
    logged: dict[str, list[float]] = {"lr": []}

    def log(engine: Any) -> None:
        for name, share in engine.state.output.items():
            logged.setdefault(name, []).append(float(collectives.sum_over_ranks(share)))
        logged["lr"].append(optimizer.param_groups[0]["lr"])

    gradients: dict[str, Tensor] = {}

    def keep_gradients() -> None:
        sharded = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.update((name, gradient.clone()) for name, gradient in full_tensors(sharded).items())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, log)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), keep_gradients)
    trainer.run(loader, max_epochs=num_epochs, epoch_length=len(loader))
    return {"logged": logged, "model": model, "gradients": gradients}


def trajectory(accelerator: Any, name: str) -> dict[str, Any]:
    """Take the recorded ten steps of reid-strong-baseline, with this rank's block of identities."""
    cfg = load_config(None, BASE + TRAJECTORIES[name])
    golden = np.load(GOLDEN / f"trajectory_{name}.npz")
    part = slice(*(16 * (collectives.rank() + i) // collectives.num_ranks() for i in (0, 1)))

    steps = iter(zip(golden["images"], golden["labels"], strict=True))

    class OneStepAnEpoch:
        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[Batch]:
            images, pids = next(steps)
            nothing = torch.zeros(0)
            yield Batch(torch.from_numpy(images[part]).double(), torch.from_numpy(pids[part]), nothing, nothing)

    outcome = trained(accelerator, cfg, OneStepAnEpoch(), GivenImages, lambda trainer: None, num_epochs=10)
    model = outcome.pop("model").eval()
    with torch.no_grad():
        outcome["probe_feats"] = model(torch.from_numpy(golden["probe"]).double())
    outcome["centers"] = getattr(model, "centers", None)
    return outcome


def variant(accelerator: Any, options: list[str], num_images_of_pid: list[int]) -> dict[str, Any]:
    """Train two epochs on random images through the real sampler, loader and augmentation."""
    cfg = load_config(None, BASE + options)
    generator = np.random.default_rng(0)
    pids = np.repeat(np.arange(len(num_images_of_pid)), num_images_of_pid)
    images = generator.integers(0, 256, (len(pids), 32, 16, 3), dtype=np.uint8)
    if cfg.DATALOADER.SAMPLER == "softmax":
        plan: Any = ShufflePlan(len(pids), batch_size=16, seed=cfg.SEED)
    else:
        plan = IdentityPlan(pids, num_pids=4, num_instances=4, seed=cfg.SEED)
    recipe = augment.Recipe((32, 16), cfg.INPUT.PROB, cfg.INPUT.PADDING, cfg.INPUT.RE_PROB, cfg.SEED)
    batches = TrainBatches(plan, rank=collectives.rank(), num_ranks=collectives.num_ranks())
    loader = BatchLoader(StoredImages([images], pids, recipe), batches, prefetch=True, pin_memory=False)
    seen: list[Any] = []
    preprocessor = BatchPreprocessor(cfg, accelerator.device)

    def wire(trainer: Any) -> None:
        schedule.set_sampler_position(trainer, batches)
        schedule.check_first_batch(trainer, cfg)

        def note(engine: Any) -> None:
            batch = engine.state.batch
            seen.append((batch.sample_ids.tolist(), preprocessor.for_training(batch).sum((1, 2, 3)).tolist()))

        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)

    outcome = trained(accelerator, cfg, loader, BatchPreprocessor, wire, num_epochs=2)
    outcome["is_sharded"] = any(isinstance(p, DTensor) for p in outcome["model"].parameters())
    state = full_tensors(outcome.pop("model").state_dict())
    outcome["state"] = {name: value.clone() for name, value in state.items()}
    parts = collectives.gather_objects(seen)
    outcome["batches"] = [[i for ids, _ in of_ranks for i in ids] for of_ranks in zip(*parts, strict=True)]
    outcome["pixels"] = [[total for _, sums in of_ranks for total in sums] for of_ranks in zip(*parts, strict=True)]
    return outcome


def evaluated(accelerator: Any, num_images: int) -> dict[str, Any]:
    """Return the scores of a fixed model on random images, in blocks of four; the first quarter are queries."""
    metrics.QUERY_BLOCK = neighbours.PRODUCT_ROWS = 4
    options = ["TEST.IMS_PER_BATCH=8", "TEST.FPR=[0.01,0.3]", "TEST.FLIP=yes", "TEST.SINGLE_GALLERY_SHOT=yes"]
    cfg = load_config(None, [*BASE, *options])
    model = built(accelerator, cfg)
    generator = np.random.default_rng(num_images)
    images = generator.integers(0, 256, (num_images, 32, 16, 3), dtype=np.uint8)
    num_pids = min(3, num_images - 1)
    pids, camids = np.arange(num_images) % num_pids, np.arange(num_images) // num_pids % 2
    num_queries = max(num_images // 4, 1)
    batches = EvaluationBatches(num_images, batch_size=8, rank=collectives.rank(), num_ranks=collectives.num_ranks())
    stores = [images[:num_queries], images[num_queries:]]
    stored = StoredImages(stores, pids, None)
    loader = BatchLoader(stored, batches, prefetch=True, pin_memory=False)
    query, gallery = (Labels.of(pids[part], camids[part]) for part in (slice(num_queries), slice(num_queries, None)))
    data = TestData(loader, query, gallery, stored)
    scores = Evaluator(model, accelerator, data, cfg).run()
    settings = ["TEST.RE_RANKING=yes", "TEST.RE_RANKING_K1=3", "TEST.RE_RANKING_K2=2"]
    reranked = Evaluator(model, accelerator, data, load_config(None, [*BASE, *options, *settings])).run()
    return {
        "summary": {"plain": scores.summary(), "re-ranked": reranked.summary()},
        "cmc": scores.cmc,
        "re-ranked AP": reranked.per_query.average_precision,
        **vars(scores.per_query),
    }


def gathered_rows() -> dict[str, Any]:
    """Gather rows of which the ranks hold unequal numbers, and the last rank none."""
    rank, num_ranks = collectives.rank(), collectives.num_ranks()
    owners = np.random.default_rng(1).integers(0, max(num_ranks - 1, 1), 11)
    ids = torch.from_numpy(np.flatnonzero(owners == rank)).flip(0)
    rows = collectives.gather_rows(torch.stack([ids * 10.0, ids * 100.0], 1), ids, 11)
    return {"rows": rows}


def shared_errors() -> dict[str, str]:
    """Return the error that this rank gets if the last one fails."""

    def fail_on_last() -> None:
        if collectives.rank() == collectives.num_ranks() - 1:
            raise DataError("no such folder")

    try:
        with collectives.errors_shared():
            fail_on_last()
    except DataError as error:
        return {"shared": str(error)}
    return {"shared": "nothing"}


def disagreement() -> str:
    """Return the error that this rank gets if the last one has other settings."""
    rate = 0.1 if collectives.rank() == collectives.num_ranks() - 1 else 0.2
    collectives.require_same_on_all_ranks({"SEED": 0})
    try:
        collectives.require_same_on_all_ranks({"SOLVER.BASE_LR": rate, "SEED": 0})
    except WorldError as error:
        return str(error)
    return "nothing"


def without_gather(work: Callable[[], Any]) -> Any:
    """Run the work with every rank mining in its local batch only."""
    original, collectives.global_batch = collectives.global_batch, lambda feat, pids: (feat, pids)
    try:
        return work()
    finally:
        collectives.global_batch = original


def sharded(accelerator: Any, work: Callable[[], Any]) -> Any:
    """Run the work with accelerate's FSDP2, which accelerate turns on for GPUs only."""
    state = accelerator.state
    before, state.distributed_type = state.distributed_type, DistributedType.FSDP
    state.fsdp_plugin = fsdp_plugin()
    state.fsdp_plugin.min_num_params = 100  # more than one group even of a tiny model
    try:
        return work()
    finally:
        state.distributed_type = before


def state_moved(accelerator: Any) -> dict[str, Any]:
    """Move a sharded model's state to another sharded and to a plain model, and take one more step of each."""
    cfg = load_config(None, [*BASE, "SOLVER.WARMUP_ITERS=0"])
    generator = np.random.default_rng(collectives.rank())
    images = torch.from_numpy(generator.integers(0, 256, (8, 32, 16, 3), dtype=np.uint8))
    drawn = torch.zeros((8, 7), dtype=torch.int32)
    batch = Batch(images, torch.arange(2).repeat_interleave(4) + 2 * collectives.rank(), torch.arange(8), drawn)

    def new() -> Any:
        return build_training(cfg, accelerator, built(accelerator, cfg))

    def step(training: Any) -> None:
        training.wrapped.train()
        training.trainer.run([batch], max_epochs=1)

    def content(training: Any) -> Any:
        return host_copy(
            {
                "model": full_tensors(training.model.state_dict()),
                "optimizer": full_tensors(training.optimizer.state_dict()),
            }
        )

    def receive(given: dict[str, Any]) -> Any:
        training = new()
        load_state(training.model, given["model"], "another model")
        load_optimizer(training.optimizer, host_copy(given["optimizer"]))  # an optimizer works in what it is given
        return training

    def all_sharded() -> list[Any]:
        training = new()
        step(training)
        first = content(training)
        other = receive(first)
        received = content(other)
        step(training)
        step(other)
        return [first, received, content(training), content(other)]

    first, received, after, after_received = sharded(accelerator, all_sharded)
    plain = receive(first)
    step(plain)
    return {
        **{"first": first, "received": received, "after": after, "after_received": after_received},
        "after_plain": content(plain),
    }


def compare_recorded(name: str, folder: Path) -> int:
    """Take the recorded steps of reid-strong-baseline of this name."""
    with _session() as accelerator:
        _write(folder, trajectory(accelerator, name))
    return 0


def compare_ranks(folder: Path) -> int:
    """Train and evaluate all that must not depend on the number of ranks."""
    with _session() as accelerator:
        num_ranks = collectives.num_ranks()
        outcome: dict[str, Any] = {"rows": gathered_rows(), "errors": collectives.gather_objects(shared_errors())}
        outcome["disagreement"] = disagreement()
        BACKBONES["resnet18"], BACKBONES["resnet34"] = TinyBackbone, BackboneWithoutBatchNorm
        BACKBONES["resnet50_ibn_a"] = BackboneWithIBN
        outcome["evaluation"] = {n: evaluated(accelerator, n) for n in EVALUATION_SIZES}
        if num_ranks > 1:
            outcome["sharded evaluation"] = {
                n: sharded(accelerator, partial(evaluated, accelerator, n)) for n in EVALUATION_SIZES
            }
        if num_ranks != 3:  # does not divide the batch
            equal, unequal = [4] * 20, [2 + 3 * i % 11 for i in range(20)]
            outcome["equal"] = {name: variant(accelerator, VARIANTS[name], equal) for name in EQUAL_COUNTS}
            outcome["unequal"] = {name: variant(accelerator, options, unequal) for name, options in VARIANTS.items()}
            if num_ranks > 1:
                outcome["state moved"] = state_moved(accelerator)
                names = ("softmax_triplet_center", "clipped", "accumulated")
                outcome["sharded"] = {
                    name: sharded(accelerator, partial(variant, accelerator, VARIANTS[name], unequal)) for name in names
                }
            outcome["wrong"] = {
                "without SyncBN": variant(accelerator, ["SOLVER.SYNC_BN=no"], unequal),
                "without gather": without_gather(lambda: variant(accelerator, [], unequal)),
            }
        _write(folder, outcome)
    return 0


@contextmanager
def _session() -> Iterator[Any]:
    # torchrun's default of one thread each; a single process uses the same, so that only the number of ranks differs.
    torch.set_num_threads(1)
    with session(read_world(os.environ), load_config(None, BASE)) as accelerator:
        yield accelerator


def _write(folder: Path, outcome: dict[str, Any]) -> None:
    torch.save(outcome, folder / f"rank_{collectives.rank()}.pt")
