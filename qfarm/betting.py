"""Betting: stop a cell that is clearly beyond a limit, with a bounded chance of ever stopping one that is not.

The hypothesis is that the mean over *all* N windows of D = cell's loss - baseline's loss is at most a limit. The
windows arrive in one random order, fixed by a seed and shared by all cells, and before each a gambler who can never
lose everything bets against the hypothesis. Under it his wealth is a non-negative supermartingale, so by Ville's
inequality it ever reaches 1 / alpha with probability at most alpha, over the permutation alone: nothing is assumed of
the losses' distribution, of the windows' independence or of when one looks (Waudby-Smith and Ramdas, arXiv 2010.09686;
without replacement: 2006.04347). A t-test looked at after every window stops 21 to 58 % of cells exactly at the limit.

Text order breaks the proof (a hard topic first stops everything), and so does an order chosen by its outcome: take
`shared_order`. All cells share the order, so false stops come together: with m cells use alpha / m.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from qfarm.errors import InvalidInput, NonFinite

FLOOR = 0.5  # nats: no window of the cell is so much better than the baseline's (seen: never better than +0.16)
_BOLDEST = 0.75  # share of the wealth that one window can cost
_ROUNDING = 1e-9  # nats; a remainder at the floor is zero up to rounding, which proves nothing
_FIRST_VARIANCE = 0.25  # nats^2, a guess that counts as one window


def shared_order(eval_id: str, windows: int) -> NDArray[np.int64]:
    """Order [windows] in which every cell of an evaluation sees its windows: a permutation seeded by the eval_id."""
    seed = int.from_bytes(hashlib.sha256(eval_id.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).permutation(windows)


class HopelessStop:
    """Tests 'the mean of all n differences is at most `limit`' (nats per token) while they arrive in random order.

    Assumes that each is at least -floor; the largest loss of the baseline is a floor that always holds, and a slow one.
    One difference below it makes the test void: it never stops from then on. Raises InvalidInput for what no test has.
    """

    def __init__(self, n: int, limit: float, alpha: float = 0.01, floor: float = FLOOR) -> None:
        if n < 1 or not math.isfinite(limit) or not 0 < alpha < 1 or not (math.isfinite(floor) and floor >= 0):
            raise InvalidInput(
                "a hopeless stop needs n >= 1, a finite limit, alpha between 0 and 1 and a floor of at least 0, "
                f"got n {n}, limit {limit}, alpha {alpha}, floor {floor}"
            )
        self.n, self.limit, self.alpha, self.floor = n, limit, alpha, floor
        self.seen = 0
        self.mean = 0.0  # of the differences seen
        self.log_wealth = 0.0
        self.void = False
        self._sum = 0.0
        self._variance = _FIRST_VARIANCE

    def add(self, difference: float) -> bool:
        """Take the next difference (nats per token); True: stop.

        Never True for the last one, after which nothing is saved. Raises NonFinite for a difference that is not finite,
        and ValueError for more than n.
        """
        if self.seen == self.n:
            raise ValueError(f"all {self.n} windows have been seen")
        if not math.isfinite(difference):
            raise NonFinite(f"the difference of window {self.seen + 1} of {self.n} is not finite")
        self.void = self.void or difference < -self.floor
        self._bet(difference)
        self._learn(difference)
        return not self.void and self.seen < self.n and self.log_wealth >= -math.log(self.alpha)

    def _bet(self, difference: float) -> None:
        """The stake depends on the past only."""
        remaining = (self.n * self.limit - self._sum) / (self.n - self.seen)  # mean at most, under the hypothesis
        room = remaining + self.floor
        if room < -_ROUNDING:
            self.log_wealth = math.inf  # even a remainder at the floor cannot bring the mean down to the limit
        elif room > _ROUNDING and self.seen and not self.void:
            gap = max(self.mean - remaining, 0.0)
            stake = min(gap / (self._variance + gap * gap), _BOLDEST / room)
            self.log_wealth += math.log1p(stake * (difference - remaining))

    def _learn(self, difference: float) -> None:
        self.seen += 1
        self._sum += difference
        away = difference - self.mean
        self.mean += away / self.seen
        self._variance += (away * (difference - self.mean) - self._variance) / (self.seen + 1)
