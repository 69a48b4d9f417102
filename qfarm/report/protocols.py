"""Protocols: plain nested data compared key by key, and what forbids to compare two rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from qfarm.matrix import canonical_hash
from qfarm.record import MetricRow


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """'options.length 2048 against 512' for each key on which two protocols disagree."""
    one, two = flatten(first), flatten(second)
    return [
        f"{key} {json.dumps(one.get(key))} against {json.dumps(two.get(key))}"
        for key in sorted({*one, *two})
        if one.get(key) != two.get(key)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as one level: {"a": {"b": [1]}} is {"a.b.0": 1}; what is empty stays as it is."""
    if not isinstance(value, (Mapping, list)) or not value:
        return {prefix: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    out: dict[str, Any] = {}
    for key, part in items:
        out |= flatten(part, f"{prefix}.{key}" if prefix else str(key))
    return out


def machine_of(metric: MetricRow) -> Any:
    """What the row's figures were timed on; None where they are no times."""
    return json.loads(metric.protocol).get("machine") if '"machine"' in metric.protocol else None


def by_machine(metric: MetricRow) -> MetricRow:
    """The row under an evaluation of its machine's own, where its figures are times: never compared with another's."""
    machine = machine_of(metric)
    return metric if machine is None else dataclasses.replace(metric, eval_id=canonical_hash([metric.eval_id, machine]))
