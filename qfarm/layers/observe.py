"""Observe: statistics of the tensors at sites, of the model as it stands, from one walk over the calibration text."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from qfarm.inputs import Collector, InputStatistics, Statistic
from qfarm.layers.attention import add_to_sites
from qfarm.layers.gradients import observe_gradients
from qfarm.layers.rtn import Quantizer
from qfarm.layers.sites import Place
from qfarm.layers.turn import Turn
from qfarm.models.load import LoadedModel
from qfarm.walk import BATCH_TOKENS, Walk

_IN_ATTENTION = ("q", "k", "v")


class _Recorders:
    """Collectors at sites other than linear inputs; they listen while their block is the current one."""

    def __init__(self, wanted: frozenset[Statistic], windows: Tensor) -> None:
        self.wanted, self.tokens, self.length, self.current = wanted, windows.numel(), windows.shape[1], -1
        self.collectors: dict[Place, Collector] = {}

    def at(self, place: Place, turn: Turn | None = None) -> Quantizer:
        """A function that returns what it is given, and remembers it, turned where its quantizer will see it so."""
        collector = self.collectors[place] = Collector(self.wanted, self.tokens, self.length)

        def listen(x: Tensor) -> Tensor:
            if self.current == place.layer:
                collector.stats.heads = x.shape[1] if place.site in _IN_ATTENTION else None
                seen = x if turn is None else turn.forward(x)
                # One row per token, all heads side by side: [batch, heads, tokens, d] -> [batch, tokens, heads x d].
                collector.add(seen.transpose(1, 2).flatten(2) if place.site in _IN_ATTENTION else seen.flatten(2))
            return x

        return listen

    def results(self) -> dict[Place, InputStatistics]:
        return {place: collector.result() for place, collector in self.collectors.items()}


@torch.no_grad()
def observe(
    loaded: LoadedModel,
    windows: Tensor,
    wanted: frozenset[Statistic],
    *,
    sites: Collection[str] = ("linear_in",),
    batch_tokens: int = BATCH_TOKENS,
) -> dict[Place, InputStatistics]:
    """What `wanted` asks for, at every place of these sites; windows [samples, length] are token ids.

    Sites are linear_in, q, k, v (after the rotary embedding) and k_pre_rope; features of the last four are those of
    all heads side by side. Linear layers that read the same tensor share one object. Sensitivities come from a backward
    pass of their own, at k_pre_rope and v.
    """
    found: dict[Place, InputStatistics] = {}
    gradients = observe_gradients(loaded, windows, sites) if Statistic.SENSITIVITY in wanted else {}
    wanted -= {Statistic.SENSITIVITY}
    if not wanted:
        return gradients
    recorders = _Recorders(wanted, windows)
    with loaded.temporary():
        for block in range(len(loaded.blocks)):
            turns = {} if block not in loaded.turns else dict.fromkeys(("q", "k"), loaded.turns[block])
            listeners = {s: recorders.at(Place(s, block), turns.get(s)) for s in _IN_ATTENTION if s in sites}
            if listeners:
                add_to_sites(loaded, block, **listeners)
            if "k_pre_rope" in sites:
                _listen_to(loaded, loaded.key_maker(block), recorders.at(Place("k_pre_rope", block)))
        walk = Walk(loaded, windows, batch_tokens)
        for block in range(len(loaded.blocks)):
            recorders.current = block
            found |= dict(_linear_inputs(loaded, walk, block, wanted))
    found = {place: stats for place, stats in found.items() if place.site in sites} | recorders.results()
    for place, stats in gradients.items():
        found[place] = dataclasses.replace(found[place], values=stats.values, sensitivity=stats.sensitivity)
    return found


def _listen_to(loaded: LoadedModel, module: nn.Module, listen: Quantizer) -> None:
    def hook(_: nn.Module, args: object, output: Tensor) -> None:
        listen(output)

    loaded.on_restore(module.register_forward_hook(hook).remove)


def _linear_inputs(
    loaded: LoadedModel, walk: Walk, block: int, wanted: frozenset[Statistic]
) -> Iterator[tuple[Place, InputStatistics]]:
    """Statistics of the block's linear inputs; the walk goes on to the next block."""
    linears, groups = loaded.linears(block), loaded.architecture.shared_inputs
    collected = walk.collect(block, {group: linears[group[0]] for group in groups}, wanted, keep_outputs=True)
    for group, stats in collected.items():
        stats.foldable = loaded.absorbs_scale(block, group)
        stats.divided = loaded.divided.get((block, group))
        stats.decided = loaded.decided.get((block, group), "")
        for role in group:
            yield Place("linear_in", block, role), stats
