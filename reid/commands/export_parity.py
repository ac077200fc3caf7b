"""Whether an exported model computes what the model itself does: in an evaluation, or on random images."""

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

# An exported model may differ by this much from the model itself.
TOLERANCE = 1e-3  # of an embedding, in units of the largest value of all
MAP_TOLERANCE = 1e-3  # of the mAP, a fraction

_RANDOM_BATCHES = (1, 2, 5)  # images in each

Embed = Callable[[Tensor], Tensor]  # normalised images [B, 3, H, W] -> embedding [B, D]
# Has all images embedded, in the same batches every time; gives the mAP of each benchmark.
Pass = Callable[[Embed], dict[str, float]]


class StandIn(nn.Module):
    """Takes the model's place in an evaluation.

    Args:
        model: whose place it takes.
        embed: what it computes.
    """

    def __init__(self, model: ReIDModel, embed: Embed) -> None:
        super().__init__()
        self.num_features, self._embed = model.num_features, embed
        self.register_parameter("of_the_same_type", nn.Parameter(next(model.parameters()).new_zeros(())))

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(images)


def evaluation_pass(cfg: CfgNode, accelerator: Accelerator, model: ReIDModel) -> Pass:
    """Query and gallery of the benchmarks to test on.

    Raises:
        DataError: they are not on this machine.
    """
    data = open_data_sets(cfg, train=False)
    build_stores(cfg, data)

    def embed_all(embed: Embed) -> dict[str, float]:
        stand_in = cast("ReIDModel", StandIn(model, embed))
        return {name: scores.mAP for name, scores in EvaluatorGroup(data, stand_in, accelerator, cfg).run().items()}

    return embed_all


def random_pass(cfg: CfgNode) -> Pass:
    """A few images of random pixels."""
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
    """Compares exported models with the model itself.

    Args:
        model: in evaluation mode.
        images: what they are compared on.
    """

    def __init__(self, model: ReIDModel, images: Pass) -> None:
        self._images, self._expected = images, list[Tensor]()

        def remember(batch: Tensor) -> Tensor:
            self._expected.append(model(batch))
            return self._expected[-1]

        with torch.no_grad():
            self._scores = images(remember)
        self._largest = max(float(embedding.abs().max()) for embedding in self._expected)

    def check(self, name: str, library: str, embed: Embed) -> str:
        """What the comparison has shown, for people.

        Args:
            name: of the exported file.
            library: that runs it.
            embed: runs it.

        Raises:
            WorldError: it computes something else.
        """
        expected, differences = iter(self._expected), list[float]()

        def compare(batch: Tensor) -> Tensor:
            embedding = embed(batch)
            differences.append(float((embedding - next(expected)).abs().max()))
            return embedding

        with torch.no_grad():
            scores = self._images(compare)
        difference = max(differences)
        words = [f"largest difference {difference:.1e} of values up to {self._largest:.3g}"]
        for benchmark, mAP in scores.items():
            before = self._scores[benchmark]
            words.append(f"{benchmark} mAP {100 * before:.2f} % by torch and {100 * mAP:.2f} % by {library}")
        is_close = difference <= TOLERANCE * self._largest  # not for NaN
        if not is_close or any(abs(mAP - self._scores[key]) > MAP_TOLERANCE for key, mAP in scores.items()):
            raise WorldError(
                f"{name} must compute what the model does, to {TOLERANCE:g} of its values and {100 * MAP_TOLERANCE:g} "
                f"points of mAP, but: {', '.join(words)}; it is not kept; use another format or version of torch",
                key="--to",
            )
        return ", ".join(words)
