"""Install: put the quantizers of a recipe where the scheme wants them, round the rest to nearest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from qfarm.errors import QfarmError
from qfarm.layers.account import cached_bits, input_bits, stored_bytes
from qfarm.layers.attention import add_to_sites
from qfarm.layers.cache import RTNLayer, SimulatedLayer
from qfarm.layers.inject import MakeLayer, install_cache, stored_bits, stored_bits_of_text
from qfarm.layers.linear import (
    Multiplier,
    ReadBySeveral,
    by_sequence,
    head_rows,
    quantize_input,
    transform_output,
    with_factor,
    with_factors,
)
from qfarm.layers.rtn import Quantizer, rtn_quantizer
from qfarm.layers.sites import TENSORS, Observed, Place
from qfarm.models.load import LoadedModel
from qfarm.recipe import ActivationMethod, CacheMethod, Recipe
from qfarm.scheme import Scheme


@dataclasses.dataclass(frozen=True, kw_only=True)
class Installed:
    """What was installed beside the weights."""

    causal: bool | None  # no quantizer looks across tokens; None: nothing was installed
    kv_bits: float | None  # stored bits per cached number; None: the cache is not quantized, or simulated only
    activation_bits: float | None = None  # per number at linear inputs, flags included; None: they are not quantized
    activation_bytes: int = 0  # of grids that calibration fixed
    notes: tuple[str, ...] = ()
    reports: tuple[Callable[[], list[str]], ...] = ()  # more notes, once everything has been evaluated
    # What calibration fixed for the KV cache, by block and role of the linear layer, for the layers' records.
    tables: Mapping[tuple[int, str], Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def install_sites(
    loaded: LoadedModel, recipe: Recipe, scheme: Scheme, observed: Observed, windows: Tensor | None = None
) -> Installed:
    """Install all of the scheme's sites except the weights. `restore` of the model removes them.

    Where a cell has calibration windows [samples, length], the bits of its KV cache are counted on their text; what
    calibration has no part in is stored in a size that does not depend on the text, and counted on noise.
    """
    wanted = scheme.sites - {"weight"}
    if not wanted:
        return Installed(causal=None, kv_bits=None)
    methods = {site: _claimant(recipe, site) for site in wanted}
    observed = with_factors(loaded, observed)
    notes: list[str] = []
    reports: list[Callable[[], list[str]]] = []
    placed: dict[Place, Quantizer] = {}
    kv_bits = None
    tables: dict[tuple[int, str], Mapping[str, Any]] = {}
    for site in sorted(wanted):
        method, bits = methods[site], getattr(scheme, site)
        if site == "kv_cache" and (method is None or isinstance(method, CacheMethod)):
            makers = _cache_makers(loaded, method, bits, observed)
            install_cache(loaded, makers)
            calibrated = method is not None and method.site_statistics()
            if calibrated and windows is not None:
                kv_bits = stored_bits_of_text(loaded, makers, windows.flatten())
            else:
                kv_bits = stored_bits(loaded, makers)
            for block, make in enumerate(makers):
                tables |= {(block, role): table for role, table in make().tables().items()}
        else:
            assert method is None or isinstance(method, ActivationMethod)
            notes += _install_tensors(loaded, method, site, bits, observed, reports, placed)
            if site == "kv_cache":
                kv_bits = cached_bits(loaded, placed, bits)
    return Installed(
        causal=all(method is None or method.causal for method in methods.values()),
        kv_bits=kv_bits,
        activation_bits=input_bits(loaded, placed, scheme.linear_in) if "linear_in" in wanted else None,
        activation_bytes=stored_bytes(placed),
        notes=tuple(notes),
        reports=tuple(reports),
        tables=tables,
    )


def _claimant(recipe: Recipe, site: str) -> ActivationMethod | CacheMethod | None:
    """The step that quantizes this site; None: round to nearest."""
    claiming = recipe.claimant(site)
    if claiming is not None and not isinstance(claiming, ActivationMethod | CacheMethod):
        raise QfarmError(f"{claiming.name} claims {site}, but has no step that quantizes it")
    return claiming


def _cache_makers(loaded: LoadedModel, method: CacheMethod | None, bits: int, observed: Observed) -> list[MakeLayer]:
    if method is None:
        return [functools.partial(RTNLayer, bits)] * len(loaded.blocks)
    return [method.cache_layer(block, bits, observed) for block in range(len(loaded.blocks))]


def _install_tensors(
    loaded: LoadedModel,
    method: ActivationMethod | None,
    site: str,
    bits: int,
    observed: Observed,
    reports: list[Callable[[], list[str]]],
    placed: dict[Place, Quantizer],
) -> list[str]:
    left: dict[str, list[int]] = {}
    found: dict[Place, Quantizer] = {}
    for place in _places(loaded, site):
        if method is None:
            quantize: Quantizer | None = rtn_quantizer(place.site, bits)
        else:
            quantize = method.quantizer(place, bits, observed)
        if quantize is None:
            left.setdefault(" ".join(filter(None, [place.site, place.role])), []).append(place.layer)
        else:
            found[place] = quantize
    if not found:
        raise QfarmError(f"{method.name if method else 'rtn'} claims {site} but quantizes nothing there")
    placed |= found
    across = method is not None and not method.causal
    for block in range(len(loaded.blocks)):
        here = {place: q for place, q in found.items() if place.layer == block}
        _install_block(loaded, block, here, across, method is not None and method.heads_apart)
    _install_simulated_cache(loaded, found)
    if method is not None:
        reports.append(functools.partial(method.report, found))
    # The three ways into the cache exclude each other, so what is not used there is not left alone.
    if method is None or site == "kv_cache":
        return []
    return [f"{method.name} leaves {what} of layers {layers} at 16 bits" for what, layers in left.items()]


def _places(loaded: LoadedModel, site: str) -> Iterator[Place]:
    for tensor in TENSORS[site]:
        for block in range(len(loaded.blocks)):
            roles: Sequence[str] = tuple(loaded.architecture.roles) if tensor == "linear_in" else ("",)
            for role in roles:
                yield Place(tensor, block, role)


def _install_block(loaded: LoadedModel, block: int, found: dict[Place, Quantizer], across: bool, by_head: bool) -> None:
    """Install quantizers of one block; `across`: those of linear inputs look across the tokens of a sequence."""
    for roles in loaded.architecture.shared_inputs:
        here = {role: found[place] for role in roles if (place := Place("linear_in", block, role)) in found}
        if by_head and "o" in here:
            here["o"] = head_rows(here["o"], loaded.head_dim)
        here = {role: with_factor(loaded, block, role, quantize) for role, quantize in here.items()}
        for role, quantize in _once(loaded, block, here, across).items():
            quantize_input(loaded, block, role, quantize)
    for place, quantize in found.items():
        if place.site == "k_pre_rope":
            transform_output(loaded, loaded.key_maker(block), head_rows(quantize, loaded.head_dim))
        elif place.site in ("q", "probs"):
            turn = loaded.turns.get(block) if place.site == "q" else None
            add_to_sites(loaded, block, **{place.site: quantize if turn is None else turn.around(quantize)})


def _once(loaded: LoadedModel, block: int, found: dict[str, Quantizer], across: bool) -> dict[str, Quantizer]:
    """Quantizers by role of layers that read the same tensor, where equal ones do their work once."""
    linears = loaded.linears(block)
    # A hook hands a layer a tensor of its own.
    apart = any(linears[role]._forward_pre_hooks for role in found)
    if apart or len(found) < 2 or not all(map(_shareable, found.values())) or len(set(found.values())) > 1:
        return {role: _whole(loaded, block, quantize, across) for role, quantize in found.items()}
    quantize = _whole(loaded, block, next(iter(found.values())), across)
    return dict.fromkeys(found, ReadBySeveral(quantize, len(found)))


def _whole(loaded: LoadedModel, block: int, quantize: Quantizer, across: bool) -> Quantizer:
    """The quantizer, which sees whole sequences if it looks across their tokens."""
    return by_sequence(loaded, block, quantize) if across and not isinstance(quantize, Multiplier) else quantize


def _shareable(quantize: Quantizer) -> bool:
    """Whether it can be told from others by its value, and takes no part in the product."""
    try:
        hash(quantize)
    except TypeError:  # of one of its fields
        return False
    return not isinstance(quantize, Multiplier)


def _install_simulated_cache(loaded: LoadedModel, found: dict[Place, Quantizer]) -> None:
    """Keys and values are quantized once, when they are written, whatever the length of the history."""
    if not any(place.site in ("k", "v") for place in found):
        return
    makers: list[MakeLayer] = [
        functools.partial(SimulatedLayer, found.get(Place("k", block)), found.get(Place("v", block)))
        for block in range(len(loaded.blocks))
    ]
    install_cache(loaded, makers)
