"""Floors: how far a model's scores move when nothing but the arithmetic changes, where a store lets it be known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qfarm.report.pairs import Key, Readable, Target, pairing_of, shared_pieces
from qfarm.stats import AccuracyDifference, Difference

NOT_KNOWN = "not known (no baseline of these files in another dtype)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """One evaluation of the full-precision cell of one checkpoint."""

    fingerprint: str
    eval_id: str
    cell_id: str
    protocol: Mapping[str, Any]
    target: Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumericFloor:
    """The largest difference between baselines of one checkpoint in two dtypes."""

    amount: float | None  # in the scale of differences; None: not known
    source: str
    flips: float | None = None  # largest share of items that went either way


def numeric_floors(store: Readable, baselines: Sequence[Baseline]) -> dict[Key, NumericFloor]:
    """By (fingerprint, eval_id), where evaluations whose protocols differ in nothing but the dtype allow it."""
    families: dict[tuple[str, str], list[Baseline]] = {}
    for one in baselines:
        if "dtype" in one.protocol:
            rest = {key: value for key, value in one.protocol.items() if key != "dtype"}
            families.setdefault((one.fingerprint, json.dumps(rest, sort_keys=True)), []).append(one)
    found: dict[Key, NumericFloor] = {}
    for alike in families.values():
        for one in alike:
            floors = [
                (difference, str(other.protocol["dtype"]))
                for other in alike
                if other is not one and (difference := _between(store, one, other)) is not None
            ]
            if floors:
                amount, dtype = max((abs(difference.delta), dtype) for difference, dtype in floors)
                flips = [one.flips.value for one, _ in floors if isinstance(one, AccuracyDifference)]
                found[one.fingerprint, one.eval_id] = NumericFloor(
                    amount=amount,
                    source=f"baseline in {one.protocol['dtype']} against {dtype}",
                    flips=max(flips, default=None),
                )
    return found


def _between(store: Readable, one: Baseline, other: Baseline) -> Difference | None:
    pieces = shared_pieces(store, (one.cell_id, one.eval_id), (other.cell_id, other.eval_id), one.target)
    return pairing_of(pieces, other.target).difference if pieces else None
