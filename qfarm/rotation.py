"""Rotation: what the rotation methods share. They differ in how they choose the matrices and in their quantizers.

    hidden states   Q, fused                       values   R per block, fused into v and o
    input of down   Hadamard matrix, online        queries and keys   Hadamard matrix after the rotary embedding

The fold is qfarm.fuse. Queries and keys are turned only where they are rounded (qfarm.layers.turn). Each method also
brings its paper's quantizers of linear inputs and of the KV cache, by default SpinQuant's: asymmetric, per token and
through zero, per token and head at the input of o, keys and values. Where another method of the chain quantizes a site,
it has the site (`quarot+qrazor`: QRazor's cache holds turned keys and rotated values).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from qfarm.fuse import Bases, Fusion
from qfarm.hadamard import Hadamard
from qfarm.inputs import Statistic
from qfarm.layers.clipped import ClippedAsymmetric, ClippedLayer
from qfarm.layers.inject import MakeLayer
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Observed, Place
from qfarm.layers.turn import Turn
from qfarm.models.architecture import rotation_rule
from qfarm.models.load import LoadedModel
from qfarm.recipe import ActivationMethod, CacheMethod, Recipe, Transform

SITES = frozenset({"linear_in", "kv_cache"})
FOLDED = "norms folded"  # `Transform.prepared` of methods that learn from the model with empty norms


class Rotation(Transform, ActivationMethod, CacheMethod):
    """Base of methods that rotate a model and have quantizers for what comes out."""

    claims = SITES
    optional = SITES
    yields = SITES
    site_widths = dict.fromkeys(SITES, range(2, 9))
    observes: ClassVar[frozenset[str]] = frozenset()
    heads_apart = True

    @property
    def needs_seed(self) -> bool:
        return True

    def site_statistics(self) -> frozenset[Statistic]:
        return frozenset()  # its grids are dynamic

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        return rotation_rule(config)

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        others = [method.name for method in recipe.transforms if method != self]
        if others:
            return f"it folds the norms and rotates all channels, which {others[0]} acts on as well; choose one of them"
        for method in recipe.methods:
            if method.options().get("pre_rope") or "k_pre_rope" in getattr(method, "observes", ()):
                return f"keys are rotated after the rotary embedding, and {method.name} quantizes them before it"
        return None

    def prepare(self, loaded: LoadedModel) -> None:
        if self.prepared:
            Fusion(loaded).install(Bases())

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer:
        return ClippedAsymmetric(bits=bits, through_zero=place.role != "o")

    def cache_layer(self, block: int, bits: int, observed: Observed) -> MakeLayer:
        return functools.partial(ClippedLayer, bits)


def hadamard_turn(loaded: LoadedModel) -> Turn:
    """Queries and keys times a Hadamard matrix."""
    hadamard = Hadamard(loaded.head_dim)
    return Turn(forward=hadamard, back=hadamard.back)


def turn_keys(loaded: LoadedModel, turns: list[Turn]) -> None:
    """Turn queries and keys of each block where they are rounded, until the model is restored."""
    loaded.on_restore(functools.partial(setattr, loaded, "turns", loaded.turns))
    loaded.turns = dict(enumerate(turns))


def turn_keys_by_hadamard(loaded: LoadedModel) -> str:
    """The same in all blocks by `hadamard_turn`; what was done."""
    turn_keys(loaded, [hadamard_turn(loaded)] * len(loaded.blocks))
    return f"queries and keys where they are rounded: {Hadamard(loaded.head_dim).how}"


def online_notes(loaded: LoadedModel, bases: Bases) -> list[str]:
    """What will stand in the model besides fused rotations; asked before `Fusion` opens it."""
    notes = ["head and embeddings have weights of their own"] if _shares_table(loaded) else []
    if bases.down is not None:
        notes.append(f"input of down, online: {bases.down.how}")
    if bases.across is not None:
        notes.append(f"heads of the input of o, online: {bases.across.how}")
    return notes


def _shares_table(loaded: LoadedModel) -> bool:
    return loaded.head.weight is loaded.model.get_input_embeddings().weight
