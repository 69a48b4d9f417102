"""Gradients: keys and values of the calibration text, each number with how much the model's loss depends on it.

The squared gradient of the loss is the diagonal of the empirical Fisher information, which KVQuant weights its k-means
with (arXiv 2401.18079, section 3.3). The loss is the cross entropy of the next token, summed over a window; windows are
read one at a time and their gradients are never added. A factor that all windows share changes no codebook: the sum
keeps the gradients of half-precision models away from underflow.

Kept per number: its value in the model's dtype and the square in bfloat16, whose range is that of float32, in host
memory. 16 windows of 2,048 tokens of a model with 32 blocks of 1,024 numbers take 8 GiB.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from qfarm.inputs import InputStatistics
from qfarm.layers.sites import Place
from qfarm.models.load import LoadedModel

SITES = frozenset({"k_pre_rope", "v"})  # places where gradients are observed


def observe_gradients(loaded: LoadedModel, windows: Tensor, sites: Collection[str]) -> dict[Place, InputStatistics]:
    """`Statistic.SENSITIVITY` at these of SITES; windows [samples, length] are token ids, features all heads."""
    found: dict[Place, InputStatistics] = {}
    passing: dict[Place, Tensor] = {}
    with loaded.temporary():
        for block in range(len(loaded.blocks)):
            makers = {"k_pre_rope": loaded.key_maker(block), "v": loaded.linears(block)["v"]}
            for site in sorted(SITES & set(sites)):
                _follow(loaded, makers[site], Place(site, block), passing)
        for index, ids in enumerate(windows):
            loss = _loss(loaded, ids.to(loaded.device))
            tensors = list(passing.values())
            gradients = torch.autograd.grad(loss, tensors)
            for place, tensor, gradient in zip(passing, tensors, gradients, strict=True):
                if place not in found:
                    found[place] = _empty(windows, tensor)
                _keep(found[place], index, tensor.detach(), gradient)
            passing.clear()
    return found


def _follow(loaded: LoadedModel, module: nn.Module, place: Place, passing: dict[Place, Tensor]) -> None:
    """Remember what the module makes, as a tensor that gradients reach although no parameter asks for any."""

    def hook(_: nn.Module, args: object, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        passing[place] = output

    loaded.on_restore(module.register_forward_hook(hook).remove)


@torch.enable_grad()
def _loss(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Cross entropy in nats, float32, summed over the next tokens of ids [length]."""
    logits = loaded.model(ids[None], use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, ids[1:], reduction="sum")


def _empty(windows: Tensor, like: Tensor) -> InputStatistics:
    shape = (*windows.shape, like[0, 0].numel())
    return InputStatistics(
        tokens=windows.numel(),
        values=torch.empty(shape, dtype=like.dtype),
        sensitivity=torch.empty(shape, dtype=torch.bfloat16),
    )


def _keep(found: InputStatistics, index: int, tensor: Tensor, gradient: Tensor) -> None:
    """tensor and gradient [1, length, ...] of window `index`."""
    assert found.values is not None and found.sensitivity is not None
    found.values[index] = tensor[0].flatten(1)
    found.sensitivity[index] = gradient[0].flatten(1).float().square()
