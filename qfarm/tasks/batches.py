"""Batches: how the log-likelihood requests of many items become few forward passes. Plain Python, no model.

The requests of one item mostly begin alike: the context, then one choice each. Where that saves enough, an item's
common prefix is read once and its tails continue from the prefix's KV cache; otherwise every sequence is read whole.
Prefixes of a batch have one length, so that they need no padding; whole sequences and tails are padded on the right,
where causality keeps the padding from everything that is scored. Quantizers that look across tokens would see it: for
cells that have some, sequences of one length are read together and nothing is padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from qfarm.errors import InvalidInput

SHARE_BELOW = 0.8  # of the tokens that whole sequences would take; two passes cost more than one of the same tokens

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation to score: the last len(targets) inputs predict the targets."""

    item: int
    inputs: Tokens  # context and continuation without its last token, cut on the left to what the model reads
    targets: Tokens

    @property
    def first(self) -> int:
        """The input that predicts the first target."""
        return len(self.inputs) - len(self.targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """Requests that are read together: a prefix, and the tails that continue it (none: the prefix is all)."""

    prefix: Tokens
    tails: tuple[Tokens, ...]  # distinct, none empty
    requests: tuple[int, ...]  # indices
    tail_of: tuple[int | None, ...]  # by request; None: it ends with the prefix

    @property
    def rows(self) -> int:
        return max(1, len(self.tails))

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prefix) + max(map(len, self.tails), default=0)


def make_request(item: int, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Request:
    """As lm-eval does: too long a sequence loses tokens on the left; the last token is only predicted.

    Raises InvalidInput for a continuation that is empty or does not fit.
    """
    if not 1 <= len(continuation) <= max_length:
        raise InvalidInput(f"item {item}: a continuation of {len(continuation)} tokens; the model reads {max_length}")
    whole = tuple(context) + tuple(continuation)
    return Request(item=item, inputs=whole[-(max_length + 1) :][:-1], targets=tuple(continuation))


def bundles(requests: Sequence[Request], share: bool) -> list[Bundle]:
    """Bundles of all requests, longest first: if memory runs out, it does so at once."""
    items: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        items.setdefault(request.item, []).append(index)
    found = [bundle for members in items.values() for bundle in _of_item(requests, members, share)]
    return sorted(found, key=lambda b: (bool(b.tails), -len(b.prefix) if b.tails else -b.length, -b.length))


def _of_item(requests: Sequence[Request], members: Sequence[int], share: bool) -> Iterator[Bundle]:
    distinct = list(dict.fromkeys(requests[index].inputs for index in members))
    common = _common_prefix(distinct)
    whole = sum(map(len, distinct))
    parts = common + sum(len(inputs) - common for inputs in distinct)
    if share and len(distinct) > 1 and common and parts <= SHARE_BELOW * whole:
        tails = tuple(inputs[common:] for inputs in distinct if len(inputs) > common)
        tail_of = tuple(tails.index(tail) if (tail := requests[index].inputs[common:]) else None for index in members)
        yield Bundle(prefix=distinct[0][:common], tails=tails, requests=tuple(members), tail_of=tail_of)
        return
    for inputs in distinct:
        own = tuple(index for index in members if requests[index].inputs == inputs)
        yield Bundle(prefix=inputs, tails=(), requests=own, tail_of=(None,) * len(own))


def _common_prefix(sequences: Sequence[Tokens]) -> int:
    first, last = min(sequences), max(sequences)  # what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def batched(found: Sequence[Bundle], budget: int, pad: bool = True) -> Iterator[list[Bundle]]:
    """Consecutive bundles of one kind whose padded sequences hold at most `budget` tokens; at least one.

    Without `pad` only sequences of one length go together.
    """
    batch: list[Bundle] = []
    for bundle in found:
        room = bool(batch) and _fit(batch, bundle) and _tokens([*batch, bundle]) <= budget
        if batch and not (room and (pad or batch[0].length == bundle.length)):
            yield batch
            batch = []
        batch.append(bundle)
    if batch:
        yield batch


def _fit(batch: Sequence[Bundle], bundle: Bundle) -> bool:
    if not bundle.tails:
        return not batch[0].tails
    return bool(batch[0].tails) and len(batch[0].prefix) == len(bundle.prefix)


def _tokens(batch: Sequence[Bundle]) -> int:
    return sum(bundle.rows for bundle in batch) * max(bundle.length for bundle in batch)
