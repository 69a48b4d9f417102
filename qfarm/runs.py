"""Runs: how a cell's numbers are computed, simulated or from packed tensors; part of an evaluation's identity.

    fake      every weight has the value that its codes stand for, in the model's dtype; quantized inputs are rounded
              and stay floating point. Measures accuracy.
    packed    linear layers multiply from the packed codes (`qfarm.layers.products` says by which operator). Measures
              speed and memory, and whether the simulation is what a kernel gives.

What cannot be run packed is refused when a job is planned, with its rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from qfarm.scheme import Scheme

if TYPE_CHECKING:
    from qfarm.evaluate import Evaluator
    from qfarm.recipe import Recipe

Run = Literal["fake", "packed"]
RUNS: tuple[Run, ...] = ("fake", "packed")  # in the order in which a cell's are measured
ON = "products_on"  # in the protocol of a packed run: "gpu", where other operators multiply; absent: the CPU's
# Raise them when the arithmetic of a packed run changes: they enter the protocol.
PRODUCTS_VERSION = 1
GPU_PRODUCTS_VERSION = 2


def run_protocol(run: Run) -> dict[str, Any]:
    """What a run adds to a protocol."""
    return {"run": run} | ({"products": PRODUCTS_VERSION} if run == "packed" else {})


def run_of(protocol: Mapping[str, Any]) -> Run:
    return "packed" if protocol.get("run") == "packed" else "fake"


def packed_refusal(recipe: Recipe, scheme: Scheme) -> str | None:
    """The rule that keeps a cell from being run packed, or None. Baselines can: nothing of theirs is packed."""
    from qfarm.recipe import CacheMethod

    for site, what in (("q", "queries"), ("probs", "softmax probabilities")):
        if site in scheme.sites:
            return f"no operator multiplies codes of {what}, which {scheme} rounds"
    if "kv_cache" in scheme.sites:
        claimant = recipe.claimant("kv_cache")
        if claimant is not None and not isinstance(claimant, CacheMethod):
            return f"{claimant.name} rounds keys and values in floating point: its cache holds no codes"
    for method in recipe.methods:
        claimed = method.claims & scheme.sites
        reason = method.packed_refusal() if "weight" in claimed else None
        if reason:
            return f"{method.name}: {reason}"
    return None


def one_device_evaluation(evaluators: Iterable[Evaluator], packed: bool) -> str | None:
    """Why what is measured of a cell needs its model on one device, or None; `packed`: some from packed layers."""
    if packed:
        return "a packed run has its layers on one device"
    compares = next((evaluator.name for evaluator in evaluators if evaluator.one_device), None)
    return compares and f"{compares} compares blocks that lie on one device"


def one_device_rule(recipe: Recipe, scheme: Scheme) -> str | None:
    """Why a cell's model has to lie on one device as a whole, or None where its blocks may be spread or streamed."""
    if recipe.transforms or recipe.site_methods:
        return "only methods of weights take a model's blocks from several places"
    if set(scheme.sites) - {"weight"}:
        return "only schemes that leave inputs and KV cache at 16 bits take a model's blocks from several places"
    return None
