"""Comparison of an exported model with the model itself, on an evaluation or on random images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from reid.data.augment import normalize
from reid.data.datasets import open_data_sets
from reid.data.loaders import build_stores
from reid.errors import WorldError
from reid.evaluation.evaluator import EvaluatorGroup
from reid.models.backbones import normalization
from reid.models.reid_model import ReIDModel

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

# Allowed differences between an exported model and the model itself.
TOLERANCE = 1e-3  # of an embedding, in units of the largest value of all
MAP_TOLERANCE = 1e-3  # of the mAP, a fraction

_RANDOM_BATCHES = (1, 2, 5)  # images in each

Embed = Callable[[Tensor], Tensor]  # normalized images [B, 3, H, W] -> embedding [B, D]
# Function that embeds all images, always in the same batches, and returns the mAP of each benchmark.
Pass = Callable[[Embed], dict[str, float]]


class Substitute(nn.Module):
    """Module that an evaluation runs in place of the model.

    Args:
        model: Model to replace.
        embed: Function that computes the embeddings.
    """

    def __init__(self, model: ReIDModel, embed: Embed) -> None:
        super().__init__()
        self.num_features, self._embed = model.num_features, embed
        # An evaluation reads dtype and device of the first parameter.
        self.register_parameter("example", nn.Parameter(next(model.parameters()).new_zeros(())))

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(images)


def evaluation_pass(cfg: CfgNode, accelerator: Accelerator, model: ReIDModel) -> Pass:
    """Return a pass over query and gallery of the test benchmarks.

    Raises:
        DataError: The benchmarks are not on this machine.
    """
    data = open_data_sets(cfg, train=False)
    build_stores(cfg, data)

    def embed_all(embed: Embed) -> dict[str, float]:
        substitute = cast("ReIDModel", Substitute(model, embed))
        return {name: scores.mAP for name, scores in EvaluatorGroup(data, substitute, accelerator, cfg).run().items()}

    return embed_all


def random_pass(cfg: CfgNode) -> Pass:
    """Return a pass over a few images of random pixels."""
    mean, std = (torch.tensor(values) for values in normalization(cfg))
    generator = torch.Generator().manual_seed(0)
    shape = (*cfg.INPUT.SIZE_TEST, 3)
    batches = [
        normalize(torch.randint(256, (num, *shape), dtype=torch.uint8, generator=generator), mean, std).contiguous()
        for num in _RANDOM_BATCHES
    ]

    def embed_all(embed: Embed) -> dict[str, float]:
        for images in batches:
            embed(images)
        return {}

    return embed_all


class Comparison:
    """Comparison of exported models with the model itself.

    Args:
        model: Model in evaluation mode.
        run_pass: Pass over the images to compare on.
        to_input: Function that turns normalized images into the input of an exported model; None if it takes them.
    """

    def __init__(self, model: ReIDModel, run_pass: Pass, to_input: Embed | None = None) -> None:
        self._pass, self._to_input, self._expected = run_pass, to_input or nn.Identity(), list[Tensor]()

        def remember(batch: Tensor) -> Tensor:
            self._expected.append(model(batch))
            return self._expected[-1]

        with torch.no_grad():
            self._scores = run_pass(remember)
        self._largest = max(float(embedding.abs().max()) for embedding in self._expected)

    def check(self, name: str, library: str, embed: Embed) -> str:
        """Return the result of a comparison as text.

        Args:
            name: Name of the exported file.
            library: Library that runs the file.
            embed: Function that runs the file.

        Raises:
            WorldError: The exported model computes something else.
        """
        expected, differences = iter(self._expected), list[float]()

        def compare(batch: Tensor) -> Tensor:
            embedding = embed(self._to_input(batch))
            differences.append(float((embedding - next(expected)).abs().max()))
            return embedding

        with torch.no_grad():
            scores = self._pass(compare)
        difference = max(differences)
        results = [f"largest difference {difference:.1e} of values up to {self._largest:.3g}"]
        for benchmark, mAP in scores.items():
            before = self._scores[benchmark]
            results.append(f"{benchmark} mAP {100 * before:.2f} % by torch and {100 * mAP:.2f} % by {library}")
        is_close = difference <= TOLERANCE * self._largest  # false for NaN
        if not is_close or any(abs(mAP - self._scores[key]) > MAP_TOLERANCE for key, mAP in scores.items()):
            raise WorldError(
                f"{name} must compute what the model does, to {TOLERANCE:g} of its values and {100 * MAP_TOLERANCE:g} "
                f"points of mAP, got: {', '.join(results)}. The file is removed. Fix: use another "
                "format or version of torch.",
                key="--to",
            )
        return ", ".join(results)
