"""Twins: decoder blocks as they are now, kept while the model's own are quantized.

A twin has modules of its own, which share parameters, buffers and the functions of hooks with the block that it was
made of. What is replaced or installed in the block later on does not reach it, so it costs no memory beside the
parameters that would otherwise be gone. Made after a recipe's transforms, twins are the full-precision model that the
quantized one is to be compared with, layer by layer: inputs are in the same basis, weights have the same columns.
"""

from __future__ import annotations

import collections

from torch import nn

from qfarm.layers.attention import SETTINGS, AttentionSites
from qfarm.models.load import LoadedModel

_OWN = (dict, collections.OrderedDict, set)  # a module's books: parameters, buffers, hooks


def twin_blocks(loaded: LoadedModel) -> list[nn.Module]:
    """A twin of each decoder block, which no `restore` of the model changes either."""
    twins = [_twin(block, {}) for block in loaded.blocks]
    for block in twins:
        attention = block.get_submodule(loaded.architecture.attention)
        if not hasattr(attention, SETTINGS):  # for the case that the model is switched to attention with sites
            setattr(attention, SETTINGS, AttentionSites())
    return twins


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in made:
        twin = made[id(module)] = type(module).__new__(type(module))
        twin.__dict__.update({k: v.copy() if type(v) in _OWN else v for k, v in vars(module).items()})
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, made)
    return made[id(module)]
