"""Steps, preprocessing, ranking and re-ranking on a device, compared with a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device_checks import (
    BATCH,
    HEIGHT,
    WIDTH,
    accelerate,
    assert_same_state,
    batches,
    batchnorm_of_rank,
    build,
    of_two_ranks,
    settings,
    tiny_model,
    trained,
)
from torch import nn

from reid.checkpoints.save import host_copy
from reid.config.load import load_config
from reid.data import augment, loaders
from reid.data.loaders import Batch, StoredImages
from reid.data.preprocessing import BatchPreprocessor
from reid.data.samplers import EvaluationBatches, ShufflePlan, TrainBatches
from reid.distributed.accelerator import move_model
from reid.evaluation.embedder import build_embedder
from reid.retrieval import neighbours
from reid.retrieval.metrics import RetrievalScores, retrieval_scores, scores_from_distmat
from reid.retrieval.reranking import k_reciprocal
from reid.runs.progress import Progress
from reid.training.checkpointing import Checkpoints
from reid.training.meters import TrainMeter
from reid.training.optim import build_optimizer

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent.parent / "golden"
# In float64 only the order of sums differs; BatchNorm and a few steps let that grow by some orders of magnitude.
EXACT = 1e-8


# ---- training steps ----

VARIANTS = {
    "sgd": [],
    "adam": ["SOLVER.OPTIMIZER_NAME=Adam"],
    "center": ["MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=triplet_center"],
    "softmax": ["DATALOADER.SAMPLER=softmax"],
    "soft_margin": ["SOLVER.MARGIN=None"],
    "accumulated": ["SOLVER.ACCUMULATE=2"],
    "clipped": ["SOLVER.CLIP_GRAD_NORM=0.5"],
    "contiguous": ["MODEL.CHANNELS_LAST=no"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_float64_steps_equal_those_of_a_cpu(device, name):
    overrides = ["SOLVER.PRECISION=fp64", "SOLVER.OPTIMIZER_NAME=SGD", *VARIANTS[name]]
    training, expected = trained(device, *overrides), trained(CPU, *overrides)
    assert next(training.model.parameters()).device.type == device.type
    assert training.losses == pytest.approx(expected.losses, rel=EXACT)
    assert training.norms == pytest.approx(expected.norms, rel=EXACT)
    if name != "adam":  # it makes a step of BASE_LR of a gradient that is nothing but rounding, before a BatchNorm
        assert_same_state(training, expected)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("fp32", 0.01),  # convolutions in TF32, 10 bits of mantissa
        ("bf16", 0.05),  # 7 bits of mantissa
        ("fp16", 0.02),  # 10 bits of mantissa
    ],
)
def test_lower_precision_trains_nearly_as_float64(device, precision, tolerance):
    expected = trained(CPU, "SOLVER.PRECISION=fp64")
    training = trained(device, f"SOLVER.PRECISION={precision}")
    assert training.losses == pytest.approx(expected.losses, rel=tolerance)
    assert training.losses != expected.losses
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
    assert training.losses[-1] < training.losses[0]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_fused_steps_equal_unfused_ones(device, name):
    def stepped(choice: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device, torch.float64)
        solver = settings(device, f"SOLVER.OPTIMIZER_NAME={name}", f"SOLVER.FUSED={choice}").SOLVER
        optimizer = build_optimizer(solver, model)
        assert {bool(group.get("fused")) for group in optimizer.param_groups} == {choice != "no"}
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 80, device=device, dtype=torch.float64).view(10, 8)).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    for fused in (stepped("auto"), stepped("yes")):
        torch.testing.assert_close(fused, stepped("no"), rtol=1e-10, atol=1e-12)


def test_channels_last_gives_the_same_steps(device):
    overrides = ("SOLVER.PRECISION=fp64", "SOLVER.OPTIMIZER_NAME=SGD")
    yes, no = (trained(device, *overrides, f"MODEL.CHANNELS_LAST={choice}") for choice in ("yes", "no"))
    for training, memory_format in ((yes, torch.channels_last), (no, torch.contiguous_format)):
        weight = training.model.base[3].weight  # type: ignore[index]
        assert weight.is_contiguous(memory_format=memory_format)
    assert yes.losses == pytest.approx(no.losses, rel=EXACT)
    assert_same_state(yes, no)


def test_channels_last_is_the_default_on_a_gpu_only(device):
    weight = build(device).model.base[3].weight  # type: ignore[index]
    assert weight.is_contiguous(memory_format=torch.channels_last) == (device.type == "cuda")


@pytest.fixture
def compiling_device(device: torch.device, request: pytest.FixtureRequest) -> torch.device:
    if device.type == "cpu":  # a minute; tests/test_engine.py has the same among its slow tests
        pytest.skip("compiling for a CPU is checked by the slow tests of tests/test_engine.py")
    return device


def test_a_compiled_model_gives_the_same_steps(compiling_device):
    plain = trained(compiling_device, "SOLVER.PRECISION=fp64")
    compiled = trained(compiling_device, "SOLVER.PRECISION=fp64", "MODEL.COMPILE=yes")
    assert compiled.losses == pytest.approx(plain.losses, rel=EXACT)
    assert list(compiled.state()) == list(plain.state())


def test_no_step_waits_for_the_device(device):
    """torch raises where Python would wait; a record, which reads the losses, may."""
    training = build(device)
    first, *others = [
        Batch(*(part.pin_memory() for part in batch)) if device.type == "cuda" else batch for batch in batches(4)
    ]
    training.trainer.run([first], max_epochs=1)  # allocates, and chooses kernels
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in others:
            training.trainer.run([batch], max_epochs=1)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert float(training.trainer.state.output["loss"]) > 0


# ---- loss scaling of fp16 ----

OVERFLOWING_SCALE = 2.0**30
FP16 = ("SOLVER.PRECISION=fp16", "SOLVER.OPTIMIZER_NAME=SGD")


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_fp16_overflow_skips_steps_until_the_scale_fits(device, optimizer):
    training = build(device, "SOLVER.PRECISION=fp16", f"SOLVER.OPTIMIZER_NAME={optimizer}")
    scaler = training.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": OVERFLOWING_SCALE})
    scales, weights = [], []
    for batch in batches(40):
        training.trainer.run([batch], max_epochs=1)
        training.losses.append(float(training.trainer.state.output["loss"]))
        scales.append(scaler.get_scale())
        weights.append(training.model.classifier.weight.detach().cpu().clone())
    skipped = [after < before for before, after in zip([OVERFLOWING_SCALE, *scales], scales, strict=False)]
    assert 2 <= sum(skipped) < 30
    assert skipped == sorted(skipped, reverse=True)  # first all that overflow, then none
    initial = tiny_model().classifier.weight
    assert all(torch.equal(weight, initial) for weight, is_skipped in zip(weights, skipped, strict=True) if is_skipped)
    assert not torch.equal(weights[-1], initial)
    assert np.isfinite(training.losses).all()
    assert np.mean(training.losses[-5:]) < np.mean(training.losses[:5])


@pytest.mark.parametrize(("name", "is_fused"), [("SGD", False), ("Adam", True)])
def test_fp16_takes_no_fused_step_that_mishandles_overflow(name, is_fused):
    """Fused SGD uses uninitialized momentum where its first step was skipped (torch 2.15)."""
    cfg = load_config(None, ["SOLVER.PRECISION=fp16", f"SOLVER.OPTIMIZER_NAME={name}"])
    optimizer = build_optimizer(cfg.SOLVER, tiny_model())
    assert {bool(group.get("fused")) for group in optimizer.param_groups} == {is_fused}


def test_a_resumed_fp16_training_keeps_the_scale(device, tmp_path):
    def checkpoints(training, folder):
        training.trainer.state.epoch_length = 1
        saved = SimpleNamespace(
            model=training.model,
            optimizer=training.optimizer,
            scaler=training.accelerator.scaler,
            meter=TrainMeter(log_period=1, batch_size=BATCH, optimizer=training.optimizer),
        )
        return Checkpoints(training.cfg, folder, "", saved, Progress())

    training = trained(device, *FP16, num_steps=3)
    scaler = training.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 512.0, "_growth_tracker": 7})
    saved = checkpoints(training, tmp_path)
    saved.save(training.trainer)
    saved.finish()
    resumed = build(device, *FP16)
    assert checkpoints(resumed, tmp_path).resume(resumed.trainer)
    state = resumed.accelerator.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (512.0, 7)
    assert_same_state(resumed, training)
    resumed.run(1)
    assert resumed.accelerator.scaler.get_scale() == 512.0


# ---- batches and preprocessing ----


def stored(num_images: int = 40) -> StoredImages:
    images = np.random.default_rng(0).integers(0, 256, (num_images, HEIGHT, WIDTH, 3), dtype=np.uint8)
    recipe = augment.Recipe((HEIGHT, WIDTH), 0.5, 2, 0.5, seed=0)
    return StoredImages([images[:7], images[7:]], np.arange(num_images) % 4, recipe)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_pinned_and_arrive_as_on_a_cpu(device, num_workers):
    plan = ShufflePlan(40, batch_size=BATCH, seed=0)

    def prepared(on: torch.device, *, is_cached: bool = False) -> list[tuple[Batch, torch.Tensor]]:
        cfg, data = settings(on, "SOLVER.PRECISION=fp64", f"DATALOADER.NUM_WORKERS={num_workers}"), stored()
        loader = loaders._build_loader(cfg, data, TrainBatches(plan, rank=0, num_ranks=1))
        every = torch.from_numpy(data.images(np.arange(40))).to(on) if is_cached else None
        preprocessor = BatchPreprocessor(cfg, on, every)
        return [(batch, preprocessor.for_training(batch)) for batch in loader]

    expected = prepared(CPU)
    for received in (prepared(device), prepared(device, is_cached=True)):
        for (batch, images), (cpu_batch, cpu_images) in zip(received, expected, strict=True):
            assert {part.is_pinned() for part in batch} == {device.type == "cuda"}
            assert all(torch.equal(a, b) for a, b in zip(batch, cpu_batch, strict=True))
            assert images.device.type == device.type
            torch.testing.assert_close(images.cpu(), cpu_images, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("choice", "is_cached"), [("auto", "cuda"), ("on", "any"), ("off", "none")])
def test_device_cache_holds_all_images_where_it_should(device, choice, is_cached):
    stores = stored()._stores
    actual = loaders._is_cached_on(device, stores, choice)
    assert actual == {"cuda": device.type == "cuda", "any": True, "none": False}[is_cached]
    if actual:
        on_device = loaders._on_device(stores, device)
        assert on_device.device.type == device.type
        assert torch.equal(on_device.cpu(), torch.from_numpy(np.concatenate(stores)))


@pytest.mark.parametrize("flip", [False, True])
def test_embeddings_equal_those_of_a_cpu(device, flip):
    def embedded(on: torch.device) -> torch.Tensor:
        cfg = settings(on, "SOLVER.PRECISION=fp64")
        accelerator = accelerate(cfg, on)
        model = tiny_model().eval()
        move_model(model, cfg, accelerator.device)
        embedder = build_embedder(model, accelerator, BatchPreprocessor(cfg, accelerator.device), flip=flip)
        data = stored()
        data._recipe = None
        loader = loaders._build_loader(cfg, data, EvaluationBatches(40, batch_size=16, rank=0, num_ranks=1))
        rows = []
        for batch in loader:
            rows.append(embedder.run([batch]).output.embedding)
        return torch.cat(rows).cpu()

    torch.testing.assert_close(embedded(device), embedded(CPU), rtol=1e-10, atol=1e-10)


def test_host_copy_holds_the_values_in_host_memory(device):
    content = {"a": torch.randn(3, 4, device=device), "b": [torch.arange(5, device=device)], "c": "text"}
    copied = host_copy(content)
    again = host_copy(content, copied)
    assert copied["a"].is_pinned() == (device.type == "cuda")
    assert again["a"].data_ptr() == copied["a"].data_ptr()
    assert torch.equal(copied["a"], content["a"].cpu())
    assert torch.equal(copied["b"][0], content["b"][0].cpu())


# ---- retrieval ----


def labels(num_queries: int, num_gallery: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, high, (size,), generator=generator) for size in (num_queries, num_gallery) for high in (12, 3)
    ]


def integers(num_images: int, num_features: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return small integers: products are exact in any order of sums, and many distances are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (num_images, num_features), generator=generator).to(dtype)


def real_numbers(num_images: int, num_features: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return clusters of five images, all at different distances."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_images // 5 + 1, num_features, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_images, num_features, generator=generator, dtype=torch.float64)
    return (centers[torch.arange(num_images) // 5] + 0.5 * noise).to(dtype)


def assert_same_scores(scores: RetrievalScores, expected: RetrievalScores, rel: float) -> None:
    for name, value in expected.summary().items():
        assert scores.summary()[name] == pytest.approx(value, rel=rel), name
    torch.testing.assert_close(scores.cmc.cpu(), expected.cmc, rtol=rel, atol=0)
    for name, value in vars(expected.per_query).items():
        actual = getattr(scores.per_query, name).cpu()
        torch.testing.assert_close(actual, value, rtol=rel, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("make", "dtype", "distances"),
    [
        (integers, torch.float32, ("euclidean",)),  # a cosine divides, which rounds
        (integers, torch.float64, ("euclidean",)),
        (real_numbers, torch.float64, ("cosine", "euclidean")),  # far from each other in float64: the same order
    ],
)
def test_retrieval_scores_equal_those_of_a_cpu(device, distance, make, dtype, distances):
    if distance not in distances:
        pytest.skip("equal cosines of different vectors are not equal when rounded")
    q, g = make(300, 16, 1, dtype), make(700, 16, 2, dtype)
    q_pids, q_camids, g_pids, g_camids = labels(300, 700)
    options = {"distance": distance, "fprs": (0.0, 0.001, 0.3), "single_gallery_shot": True}

    def scores(on: torch.device) -> RetrievalScores:
        return retrieval_scores(q.to(on), q_pids, q_camids, g.to(on), g_pids, g_camids, **options)

    # Means of float64 may be summed in another order; positions are integers and must be equal.
    assert_same_scores(scores(device), scores(CPU), rel=1e-12)


def test_equal_distances_are_ranked_by_gallery_order(device):
    """Integer distances in float32 have the order of a stable sort, on any device."""
    distmat = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (50, 400)).astype(np.float32))
    q_pids, q_camids, g_pids, g_camids = labels(50, 400)
    scores = scores_from_distmat(distmat.to(device), q_pids, q_camids, g_pids, g_camids)
    order = distmat.argsort(dim=1, stable=True)
    for row in range(50):
        pids, camids = g_pids[order[row]], g_camids[order[row]]
        is_kept = (pids != q_pids[row]) | (camids != q_camids[row])
        matches = (pids[is_kept] == q_pids[row]).nonzero()[:, 0]
        first = int(matches[0]) if len(matches) else -1
        assert int(scores.per_query.first_match[row]) == first


def test_recorded_scores_are_those_of_the_device(device, golden):
    sides = [golden[f"{side}_{what}"] for side in ("query", "gallery") for what in ("feats", "pids", "camids")]
    on_device = [torch.from_numpy(side).to(device) for side in sides]
    q, g = (side.double() for side in (on_device[0], on_device[3]))
    scores = retrieval_scores(q, *on_device[1:3], g, *on_device[4:])
    expected = retrieval_scores(q.cpu(), *sides[1:3], g.cpu(), *sides[4:])
    assert_same_scores(scores, expected, rel=1e-12)


@pytest.mark.parametrize(("make", "dtype"), [(integers, torch.float32), (real_numbers, torch.float64)])
def test_nearest_neighbours_equal_those_of_a_cpu(device, make, dtype, monkeypatch):
    monkeypatch.setattr(neighbours, "PRODUCT_ROWS", 100)
    embedding = make(700, 8, 3, dtype)
    embedding[50] = embedding[3]  # equal images, and distance 0
    actual, expected = (neighbours.Points.of(embedding.clone().to(on)) for on in (device, CPU))
    for block in neighbours.row_blocks(700):
        indices, farthest = neighbours.nearest(actual, block, 20)
        cpu_indices, cpu_farthest = neighbours.nearest(expected, block, 20)
        assert torch.equal(indices.cpu(), cpu_indices)
        torch.testing.assert_close(farthest.cpu(), cpu_farthest, rtol=1e-10 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("parameters", [(20, 6, 0.3), (25, 1, 0.0)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-9),
        (torch.float32, 2e-3),  # weights of pairs on the edge of a neighbourhood change with the last bit of a distance
    ],
)
def test_reranked_distances_equal_those_of_a_cpu(device, parameters, dtype, tolerance):
    q, g = real_numbers(60, 16, 4, dtype), real_numbers(240, 16, 4, dtype)
    distmat = k_reciprocal(q.to(device), g.to(device), *parameters)
    assert distmat.device.type == device.type
    expected = k_reciprocal(q, g, *parameters)
    torch.testing.assert_close(distmat.cpu(), expected, rtol=0, atol=tolerance)
    if dtype == torch.float64:
        assert torch.equal(
            distmat.cpu().argsort(dim=1, stable=True)[:, :5], expected.argsort(dim=1, stable=True)[:, :5]
        )


def test_recorded_reranking_is_that_of_the_device(device):
    golden = np.load(GOLDEN / "reranking.npz")
    q, g = (torch.from_numpy(golden[f"{side}_feats"]).to(device) for side in ("query", "gallery"))
    distmat = k_reciprocal(q, g, 20, 6, 0.3)
    wanted = torch.from_numpy(golden["k1_20_k2_6_lambda_0.3"]).to(distmat.dtype)
    torch.testing.assert_close(distmat.cpu(), wanted, rtol=0, atol=2e-3)  # as on a CPU, tests/test_reranking.py


# ---- BatchNorm over two ranks ----


def test_synchronized_batchnorm_of_two_ranks_is_that_of_one(device):
    """The layer is torch's on a GPU, and this project's on a CPU; both ranks share the device."""
    kind = "SyncBatchNorm" if device.type == "cuda" else "_CPUSyncBatchNorm"
    for actual, worst in of_two_ranks(batchnorm_of_rank, device.type):
        assert actual == kind
        assert worst < 1e-10
