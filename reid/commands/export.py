"""The command `export`: write a trained model for other programs; each file is first compared with the model."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reid.checkpoints import weights
from reid.checkpoints.safetensors_files import write_safetensors
from reid.checkpoints.state_dicts import checksum_of, num_pids_of, state_dict_of
from reid.checkpoints.trained import TrainedModel, load_trained
from reid.commands.export_parity import Comparison, Embed, evaluation_pass, random_pass
from reid.config.load import dump
from reid.data.augment import normalize_at_once
from reid.errors import DataError, SettingsError, WorldError, reason_of
from reid.models.backbones import normalization
from reid.models.reid_model import ReIDModel
from reid.process.files import atomic_write, disk_errors
from reid.process.signals import Signals

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCH = torch.export.Dim("batch", min=1)
_INPUTS = {
    False: "float32 [B, 3, H, W]: RGB in 0..1, minus pixel_mean, over pixel_std",
    True: "uint8 [B, H, W, 3]: RGB",
}


def export(
    cfg: CfgNode,
    accelerator: Accelerator,
    signals: Signals,
    *,
    to: tuple[str, ...],
    output: str | None,
    check: str,
    uint8: bool,
) -> None:
    """Write TEST.WEIGHT in other formats; runs in one process, on the CPU, in float32.

    Args:
        cfg: All settings.
        accelerator: Accelerator used for autocast in the evaluation.
        signals: Received signals; unused, as there is nothing to save.
        to: Formats of `arguments.FORMATS`.
        output: Folder of the files; None for that of TEST.WEIGHT.
        check: Data to compare on, one of `arguments.CHECKS`.
        uint8: Whether the exported model takes uint8 pixels and normalizes them.

    Raises:
        SettingsError: TEST.WEIGHT would be overwritten.
        WorldError: A package is missing, the checkpoint does not fit, a file cannot be written, or an exported model
            computes something else.
    """
    del signals
    if "onnx" in to:
        _require_onnx()
    trained = load_trained(cfg, accelerator)
    weight = trained.file
    folder = Path(output) if output else weight.parent
    with disk_errors(folder, key="--output"):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = describe(cfg, trained)
    if "safetensors" in to:
        _write_weights(folder / f"{weight.stem}.safetensors", weight, trained, metadata)
    if not set(_WRITERS) & set(to):
        return
    comparison = _build_comparison(cfg, accelerator, trained.model, check, uint8=uint8)
    for name in ("classifier", "centers"):  # used by training only, and large if there are many identities
        if hasattr(trained.model, name):
            delattr(trained.model, name)
    with _quiet(f"MODEL.NAME {cfg.MODEL.NAME} cannot be exported by torch {torch.__version__}"):
        program = trace(trained.model, cfg, uint8=uint8)
    for name in [name for name in _WRITERS if name in to]:
        suffix, library, write = _WRITERS[name]
        file = folder / f"{weight.stem}{suffix}"
        with atomic_write(file, key="--output") as temporary:
            with _quiet(f"{file} cannot be written by torch {torch.__version__}"):
                run = write(temporary, program, metadata | {"input": _INPUTS[uint8]})
            result = comparison.check(file.name, library, run) if comparison else "not checked"
            size = temporary.stat().st_size
        logger.info("%s: %.1f MB, %s", file, size / 1e6, result)


def describe(cfg: CfgNode, trained: TrainedModel) -> dict[str, str]:
    """Return what a user of the weights has to know: strings, and JSON for other types."""
    mean, std = normalization(cfg)
    known = {
        "num_pids": num_pids_of(trained.content),
        "num_features": trained.model.num_features,
        "size": list(cfg.INPUT.SIZE_TEST),  # height, width
        "pixel_mean": list(mean),
        "pixel_std": list(std),
        "last_stride": cfg.MODEL.LAST_STRIDE,
        "stem_relu": cfg.MODEL.STEM_RELU,
        "feat_norm": cfg.TEST.FEAT_NORM,  # whether embeddings are compared by cosine
        "flip": cfg.TEST.FLIP,  # whether the embedding to compare is the mean over image and mirror image
    }
    epoch = trained.content.get("epoch")
    return {
        "model_name": cfg.MODEL.NAME,
        "neck": cfg.MODEL.NECK,
        "neck_feat": cfg.TEST.NECK_FEAT,
        **{name: json.dumps(value) for name, value in known.items()},
        **({"epoch": str(epoch)} if isinstance(epoch, int) else {}),
        "source": Path(cfg.TEST.WEIGHT).name,
        "checksum": trained.checksum,
        "config": dump(cfg),
    }


class FromPixels(nn.Module):
    """Model that also normalizes its images: uint8 RGB [B, H, W, 3] -> embedding [B, D].

    Args:
        model: Model of normalized images.
        mean: Mean [3] of the pixels, in 0..1.
        std: Standard deviation [3] of the pixels, in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.model(normalize_at_once(images, self.mean, self.std).contiguous())
        return embedding


def trace(model: ReIDModel, cfg: CfgNode, *, uint8: bool) -> torch.export.ExportedProgram:
    """Return the graph of the model in evaluation mode, for any number of images of INPUT.SIZE_TEST."""
    height, width = cfg.INPUT.SIZE_TEST
    example = torch.zeros((2, height, width, 3), dtype=torch.uint8) if uint8 else torch.zeros((2, 3, height, width))
    traced: nn.Module = FromPixels(model, *_mean_and_std(cfg)).eval() if uint8 else model
    return torch.export.export(traced, (example,), dynamic_shapes=({0: _BATCH},))


def _mean_and_std(cfg: CfgNode) -> tuple[Tensor, Tensor]:
    mean, std = normalization(cfg)
    return torch.tensor(mean), torch.tensor(std)


def _to_pixels(cfg: CfgNode) -> Embed:
    """Return a function that undoes the normalization, exactly, as pixels are integers."""
    mean, std = (values[:, None, None] for values in _mean_and_std(cfg))
    return lambda images: ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _build_comparison(
    cfg: CfgNode, accelerator: Accelerator, model: ReIDModel, check: str, *, uint8: bool
) -> Comparison | None:
    if check == "none":
        return None
    run_pass = random_pass(cfg)
    if check == "evaluation":
        try:
            run_pass = evaluation_pass(cfg, accelerator, model)
        except DataError as error:
            logger.warning("warning: no evaluation is possible (%s); comparing on random images instead", error)
    return Comparison(model, run_pass, _to_pixels(cfg) if uint8 else None)


def _write_weights(file: Path, weight: Path, trained: TrainedModel, metadata: dict[str, str]) -> None:
    if file.resolve() == weight.resolve():
        raise SettingsError(
            f"--output must be another folder than that of TEST.WEIGHT, got {file} for both. Fix: add --output FOLDER.",
            key="--output",
        )
    with atomic_write(file, key="--output") as temporary:
        write_safetensors(temporary, state_dict_of(trained.content), metadata)
        checksum = checksum_of(weights.read_file(temporary, "the file", key="--output"))
        if checksum != trained.checksum:
            raise WorldError(
                f"{file} must have the checksum {trained.checksum} after writing, got {checksum}. Fix: choose another "
                "disk by --output.",
                key="--output",
            )
        size = temporary.stat().st_size
    logger.info("%s: %.1f MB, checksum %s as in the source", file, size / 1e6, checksum)


def _write_program(file: Path, program: torch.export.ExportedProgram, metadata: dict[str, str]) -> Embed:
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    module: Embed = torch.export.load(file).module()
    return module


def _write_onnx(file: Path, program: torch.export.ExportedProgram, metadata: dict[str, str]) -> Embed:
    import onnxruntime

    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["embedding"],
        dynamic_shapes=({0: _BATCH},),
        verbose=False,
    )
    assert onnx_program is not None
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(file, external_data=False)
    onnxruntime.disable_telemetry_events()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _require_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise WorldError(
            f"--to onnx requires the packages {', '.join(_ONNX_PACKAGES)}, but {', '.join(missing)} is missing. Fix: "
            "install them with: uv sync --extra export",
            key="--to",
        )


@contextlib.contextmanager
def _quiet(failure: str) -> Iterator[None]:
    """Suppress the output of the exporter and translate its errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:  # torch.export and ONNX raise nearly anything
        reason = reason_of(error)
        raise WorldError(f"{failure}: {reason}. Fix: choose other formats by --to.", key="--to") from error
    finally:
        logging.disable(disabled)


# Formats that hold the model and not only its weights: suffix, library that runs the file, function that writes it.
_WRITERS: dict[str, tuple[str, str, Callable[[Path, torch.export.ExportedProgram, dict[str, str]], Embed]]] = {
    "torch": (".pt2", "torch.export", _write_program),
    "onnx": (".onnx", "onnxruntime", _write_onnx),
}
