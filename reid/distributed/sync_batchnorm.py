"""BatchNorm over the global batch: torch's on GPUs, and one for CPUs, which torch's does not support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from reid.distributed import collectives


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """Return the model with every BatchNorm synchronized, or unchanged on a single rank; parameters stay the same."""
    if collectives.num_ranks() == 1:
        return model
    if any(parameter.is_cuda for parameter in model.parameters()):
        return _synchronize_on_gpus(model)
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            kind = _CPUSyncBatchNormAct if _is_fused(child) else _CPUSyncBatchNorm
            setattr(model, name, kind.like(child))
        else:
            synchronize_batchnorm(child)
    return model


def _is_fused(layer: nn.Module) -> bool:
    """Return whether the layer is timm's BatchNormAct2d, which includes the activation that follows."""
    return hasattr(layer, "act")


def _synchronize_on_gpus(model: nn.Module) -> nn.Module:
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    if any(_is_fused(layer) for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        from timm import layers

        convert = layers.convert_sync_batchnorm  # type: ignore[attr-defined]  # torch's would drop the activations
    return convert(model)


class _CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d or 2d with the training statistics of all ranks together."""

    @classmethod
    def like(cls, original: nn.modules.batchnorm._BatchNorm) -> _CPUSyncBatchNorm:
        """Return a synchronized layer with the same parameters and buffers (not copies)."""
        layer = cls(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats
        )
        layer.weight, layer.bias = original.weight, original.bias
        layer.running_mean, layer.running_var = original.running_mean, original.running_var
        layer.num_batches_tracked = original.num_batches_tracked
        return layer.train(original.training)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # Under autocast the input may be bfloat16, which is too inexact for statistics.
        wide = input.to(self.weight.dtype)
        output, mean, variance, count = _GlobalBatchNorm.apply(wide, self.weight, self.bias, self.eps)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        return output.to(input.dtype)  # type: ignore[no-any-return]


class _CPUSyncBatchNormAct(_CPUSyncBatchNorm):
    """Synchronized BatchNorm with the dropout and activation of timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    @classmethod
    def like(cls, original: nn.modules.batchnorm._BatchNorm) -> _CPUSyncBatchNormAct:
        layer = cast("_CPUSyncBatchNormAct", super().like(original))
        layer.drop, layer.act = cast("nn.Module", original.drop), cast("nn.Module", original.act)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


class _GlobalBatchNorm(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias over all ranks; one collective forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, float]:
        # The kernel that a single process uses, in a fifth of the time of torch.var_mean.
        local_mean, local_variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        local_count = local_mean.new_full((1,), x.numel() / x.shape[1])
        gathered = collectives.all_gather(torch.cat([local_mean, local_variance, local_count])[None])  # [W, 2 C + 1]
        means, variances, counts = torch.split(gathered, [x.shape[1], x.shape[1], 1], dim=1)
        count = float(counts.sum())
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        output = nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad = grads[0]
        x, weight, mean, inverse_std = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = [0, *range(2, x.dim())]
        centered = x - mean.view(shape)
        grad_weight = (grad * centered).sum(dims) * inverse_std  # this rank's; averaged with the other gradients
        grad_bias = grad.sum(dims)
        total_weight, total_bias = collectives.sum_over_ranks(torch.stack([grad_weight, grad_bias])) / ctx.count
        scale = inverse_std * weight
        grad_x = centered.mul_((-scale * inverse_std * total_weight).view(shape))
        grad_x.addcmul_(grad, scale.view(shape)).sub_((scale * total_bias).view(shape))
        return grad_x, grad_weight, grad_bias, None
