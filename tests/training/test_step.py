"""The training step: what it computes in, in how many parts, and what is refused.

Also covers reid.training.step, reid.training.build, reid.training.meters, reid.data.preprocessing,
reid.evaluation.embedder and reid.distributed.accelerator.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from ignite.engine import Events
from refusals import refused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reid.config.load import load_config
from reid.config.rules import validate_training
from reid.data.augment import augment_at_once
from reid.data.loaders import Batch
from reid.data.preprocessing import BatchPreprocessor
from reid.distributed.accelerator import build_accelerator, clip_gradients
from reid.errors import SettingsError, WorldError
from reid.evaluation.embedder import build_embedder
from reid.models.reid_model import ReIDModel
from reid.training.build import build_training
from reid.training.meters import TrainMeter

BASE = ["MODEL.DEVICE=cpu", "SOLVER.IMS_PER_BATCH=16", "INPUT.SIZE_TRAIN=(32,16)", "INPUT.PADDING=2"]


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def tiny_model(*, freeze_bn: bool = False) -> ReIDModel:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16)]
    options = {"bnneck": True, "embed_after_neck": True, "with_centers": False}
    return ReIDModel(nn.Sequential(*layers), 16, 4, freeze_bn=freeze_bn, **options)


def batches(num_batches: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_batches, 16, 32, 16, 3), dtype=torch.uint8, generator=generator)
    pids = torch.arange(4).repeat_interleave(4)
    drawn = torch.tensor([0, 2, 2, 0, 0, 0, 0], dtype=torch.int32).repeat(16, 1)
    return [Batch(part, pids, torch.arange(16), drawn) for part in images]


def trained(
    *overrides: str, num_steps: int = 6, model: ReIDModel | None = None, norms: list[float] | None = None
) -> tuple[ReIDModel, list[float]]:
    """Return the model after some steps, and the loss of each."""
    cfg = load_config(None, [*BASE, *overrides])
    accelerator = build_accelerator(cfg, on_gpu=False, num_ranks=1)
    model = (model or tiny_model()).train()
    trainer = build_training(cfg, accelerator, model).trainer
    losses = []
    for batch in batches(num_steps):
        trainer.run([batch], max_epochs=1)
        losses.append(float(trainer.state.output["loss"]))
        if norms is not None:
            norms.append(float(trainer.state.output["grad_norm"]))
    return model, losses


# ---- SOLVER.PRECISION ----


def test_bf16_trains_nearly_as_float32():
    _, exact = trained("SOLVER.BASE_LR=0.01", "SOLVER.WARMUP_ITERS=0")
    AcceleratorState._reset_state(True)
    model, rounded = trained("SOLVER.BASE_LR=0.01", "SOLVER.WARMUP_ITERS=0", "SOLVER.PRECISION=bf16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("has_bf16", "is_named"), [(False, True), (True, False)])
def test_missing_cpu_support_for_bf16_is_reported(monkeypatch, caplog, has_bf16, is_named):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_bf16)
    with caplog.at_level("INFO", logger="reid"):
        build_accelerator(load_config(None, ["SOLVER.PRECISION=bf16"]), on_gpu=False, num_ranks=1)
    assert len(caplog.messages) == is_named
    assert all("SOLVER.PRECISION bf16" in message and "fp32" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("key", "value", "remedy"), [("SOLVER.PRECISION", "fp16", "fp32 or bf16"), ("SOLVER.SHARDING", "fsdp", "none")]
)
def test_options_accelerate_would_ignore_on_cpu_are_rejected(key, value, remedy):
    cfg = load_config(None, [f"{key}={value}"])
    with refused(SettingsError, key, value, "CPU", remedy):
        build_accelerator(cfg, on_gpu=False, num_ranks=2)


# ---- SOLVER.ACCUMULATE ----


@pytest.mark.parametrize(("num_parts", "num_passes"), [(1, 1), (4, 4)])
def test_running_statistics_see_every_image_once(num_parts, num_passes):
    model, _ = trained(f"SOLVER.ACCUMULATE={num_parts}", num_steps=1)
    assert {int(layer.num_batches_tracked) for layer in model._batchnorms()} == {num_passes}


def test_batchnorm_uses_each_micro_batch_and_loss_stays_close():
    settings = ("SOLVER.BASE_LR=0.01", "SOLVER.WARMUP_ITERS=0")
    _, at_once = trained(*settings, num_steps=1)
    _, in_parts = trained(*settings, "SOLVER.ACCUMULATE=4", num_steps=1)
    assert in_parts != pytest.approx(at_once, rel=1e-6)
    assert in_parts == pytest.approx(at_once, rel=0.3)


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "keywords"),
    [
        (["SOLVER.ACCUMULATE=3"], 1, ("SOLVER.ACCUMULATE=3", "(1)", "got 64", "63 or 66")),
        (["SOLVER.ACCUMULATE=8"], 16, ("SOLVER.ACCUMULATE=8", "(16)", "got 64", "128")),
        (["SOLVER.ACCUMULATE=64"], 1, ("SOLVER.ACCUMULATE", "BatchNorm", "got 64")),
        (["SOLVER.ACCUMULATE=16", "SOLVER.SYNC_BN=no"], 4, ("got 16", "SOLVER.IMS_PER_BATCH=64", "4 ranks")),
    ],
)
def test_a_batch_that_cannot_be_cut_is_rejected(overrides, num_ranks, keywords):
    with pytest.raises(SettingsError) as error:
        validate_training(load_config(None, overrides), num_ranks)
    assert all(keyword in str(error.value) for keyword in keywords), error.value


# ---- MODEL.FREEZE_BN ----


def test_frozen_batchnorm_stays_as_it_is_and_the_rest_learns():
    start = tiny_model(freeze_bn=True)
    before = copy.deepcopy(start.state_dict())
    model, _ = trained("SOLVER.BASE_LR=0.01", "SOLVER.WARMUP_ITERS=0", model=start)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith(("base.1.", "base.4."))} | {"bottleneck.bias"}


# ---- MODEL.COMPILE ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns a lot
def test_a_compiled_model_learns_the_same():
    settings = ("SOLVER.BASE_LR=0.01", "SOLVER.WARMUP_ITERS=0")
    plain, losses = trained(*settings)
    compiled, compiled_losses = trained(*settings, "MODEL.COMPILE=yes")
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with refused(WorldError, "MODEL.COMPILE", "g++"):
        trained("MODEL.COMPILE=yes")


# ---- TEST.FLIP ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flip_embedding_is_mean_of_image_and_mirrored_image(precision):
    cfg = load_config(None, [*BASE, f"SOLVER.PRECISION={precision}"])
    accelerator = build_accelerator(cfg, on_gpu=False, num_ranks=1)
    model, (batch,) = tiny_model().eval(), batches(1)

    def embedded(batch: Batch, *, flip: bool = False) -> torch.Tensor:
        embedder = build_embedder(model, accelerator, BatchPreprocessor(cfg, accelerator.device), flip=flip)
        return embedder.run([batch]).output.embedding

    mirrored = embedded(batch._replace(images=batch.images.flip(2)))
    assert not torch.equal(mirrored, embedded(batch))
    torch.testing.assert_close(embedded(batch, flip=True), (embedded(batch) + mirrored) / 2, rtol=0, atol=0)
    assert embedded(batch, flip=True).dtype == torch.float32


# ---- the gradient's norm ----


@pytest.mark.parametrize("clipped", ["", "SOLVER.CLIP_GRAD_NORM=0.5"])
@pytest.mark.parametrize("parts", ["", "SOLVER.ACCUMULATE=2"])
def test_reported_gradient_norm_is_global_and_before_clipping(monkeypatch, clipped, parts):
    seen = []

    def recorded(accelerator, model, max_norm):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        seen.append(sum(float((gradient.double() ** 2).sum()) for gradient in gradients) ** 0.5)
        norms = clip_gradients(accelerator, model, max_norm)
        after = sum(float((gradient.double() ** 2).sum()) for gradient in gradients) ** 0.5
        assert after == pytest.approx(min(seen[-1], max_norm or seen[-1]), rel=1e-4)
        return norms

    monkeypatch.setattr("reid.training.step.clip_gradients", recorded)
    norms = []
    trained(*filter(None, (clipped, parts)), num_steps=3, norms=norms)
    assert norms == pytest.approx(seen, rel=1e-6)
    assert min(seen) > 0.5  # so that clipping does something


# ---- nothing waits for the device between two records ----


class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU, on any device: values that Python reads, and shapes that hang on values."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
    METHODS = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any, **options: Any) -> Any:
            self.seen.append(name)
            return method(*arguments, **options)

        return noting

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        has_mask = name.startswith("index") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8)
            for part in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        counts_repeats = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if name in self.OPERATIONS or has_mask or counts_repeats:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.repeat_interleave(x.long()),
    ],
    ids=["item", "float", "bool", "tolist", "cpu", "numpy", "mask", "nonzero", "equal", "repeat_interleave"],
)
def test_device_synchronization_is_detected(monkeypatch, wait):
    with Waits(monkeypatch) as waits:
        wait(torch.ones(3))
    assert waits.seen


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["SOLVER.OPTIMIZER_NAME=SGD"],
        ["SOLVER.ACCUMULATE=2"],
        ["SOLVER.PRECISION=bf16"],
        ["MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=triplet_center"],
    ],
    ids=["defaults", "sgd", "accumulate", "bf16", "center"],
)
def test_no_step_waits_for_the_device_until_a_record_is_due(monkeypatch, overrides):
    monkeypatch.setattr("reid.data.preprocessing.augment", augment_at_once)  # as on a GPU
    cfg = load_config(None, [*BASE, *overrides])
    accelerator = build_accelerator(cfg, on_gpu=False, num_ranks=1)
    model = tiny_model().train()
    if cfg.MODEL.IF_WITH_CENTER:
        model.register_buffer("centers", torch.randn(4, 16))
    training = build_training(cfg, accelerator, model)
    trainer = training.trainer
    meter = TrainMeter(log_period=4, batch_size=16, optimizer=training.optimizer)
    meter.attach(trainer)
    waits, seen = Waits(monkeypatch), []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine):
        seen.append(list(waits.seen))
        waits.seen.clear()

    with waits:
        trainer.run(batches(6), max_epochs=1)
    assert seen[3]  # the record after the fourth step
    assert seen[:3] == [[], [], []], seen
    assert seen[4] == [], seen
