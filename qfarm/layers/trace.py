"""Trace: where in a model numbers first stop being finite."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from qfarm.models.load import LoadedModel


class _Found(Exception):
    """Ends the pass."""


@torch.no_grad()
def first_nonfinite(loaded: LoadedModel, ids: Tensor) -> str | None:
    """The first linear layer that is fed, or returns, NaN or Inf while token ids [length] are read, in words.

    None where every layer's numbers are finite. The pass is made again for this, alone: nothing watches usual ones.
    """
    words: list[str] = []
    handles = []

    def look(name: str, what: str, x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            words.append(f"{what} of {name}")
            raise _Found

    def watch(linear: nn.Linear, name: str) -> None:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            look(name, "the input", args[0])

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            look(name, "the output", output)

        handles.extend([linear.register_forward_pre_hook(before), linear.register_forward_hook(after)])

    try:
        for block in range(len(loaded.blocks)):
            for role, linear in loaded.linears(block).items():
                watch(linear, f"layer {block} {role}")
        with contextlib.suppress(_Found):
            loaded.body(ids[None].to(loaded.device))
    finally:
        for handle in handles:
            handle.remove()
    return words[0] if words else None
