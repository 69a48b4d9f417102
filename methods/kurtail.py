"""KurTail: SpinQuant's rotations, chosen so that what is quantized has light tails; no gradient passes the model.

    kappa(y) = mean((y - mean y)^4) / mean((y - mean y)^2)^2          3 for Gaussian, 1.8 for uniform numbers
    R1  minimises the mean over block inputs of | mean over tokens of kappa(x R1) - 1.8 |
    R2  of each layer the same for its values, all heads alike

x are inputs of q, k, v and of gate, up behind emptied norms, kappa is taken of each token across its channels, since
steps are per token. R1 and R2 start as random Hadamard matrices and move along the orthogonal group in the direction of
Adam (qfarm.cayley); of all iterates the best is kept, so that the result is never worse than the start. The online
rotations, the fuse and the quantizers are SpinQuant's (arXiv 2503.01483).

Stored: as QuaRot.

Only the abstract of the paper could be read: that rotations are learned layer by layer to lower kurtosis, for 4-bit
weights, activations and KV cache. The target, the distance, kappa per token, the optimiser, its rate and the number of
steps are this file's; so whether it differs from the authors' recipe cannot be said. Published: perplexity 15.5 % below
QuaRot and 2.9 % below SpinQuant, without the models in the abstract.

What is read of the calibration text are up to 512 ordinary tokens per input (norms up to 4 times the median), which the
whole text supplies evenly.
"""

from __future__ import annotations

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.cayley import nearest_orthogonal, step
from qfarm.fuse import Bases, Fusion
from qfarm.hadamard import Hadamard, random_hadamard
from qfarm.inputs import InputStatistics, Statistic
from qfarm.layers.sites import Observed, Place
from qfarm.models.load import LoadedModel
from qfarm.recipe import STRICT
from qfarm.rotation import FOLDED, Rotation, online_notes, turn_keys_by_hadamard

UNIFORM = 1.8  # kurtosis of the uniform distribution
MOMENTS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, as usual
CHECKS = 10  # how often the loss on all rows is taken, for keeping the best iterate


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KurTail(Rotation):
    source = "Akhondzadeh et al., Findings of EMNLP 2025, arXiv 2503.01483 (abstract only)"
    learns_from = frozenset({"linear_in", "v"})
    prepared = FOLDED

    steps: int = Field(100, ge=0, description="of descent; 0: random Hadamard matrices as they are drawn")
    rows: int = Field(64, ge=1, description="tokens of each input per step")
    rate: float = Field(0.01, gt=0, description="longest step, where 1 / ||W||_1 is not shorter still")
    target: float = Field(UNIFORM, ge=1, description="kurtosis aimed at; 1.8 is that of uniform numbers")
    squared: bool = Field(False, description="squared distance from the target instead of the absolute one")

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.SAMPLE})

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        linears, width, blocks = loaded.linears(0), loaded.head_dim, range(len(loaded.blocks))
        draw = torch.Generator().manual_seed(seed)
        inputs = together([_rows(observed[Place("linear_in", b, role)]) for b in blocks for role in ("q", "up")])
        cached = together([_rows(observed[Place("v", b)]).reshape(-1, width) for b in blocks])
        stream, before, after = self.descend(inputs, random_hadamard(inputs.shape[-1], draw)[None], draw)
        start = torch.stack([random_hadamard(width, draw) for _ in blocks])
        values, value_before, value_after = self.descend(cached, start, draw)
        heads = linears["v"].out_features // width
        bases = Bases(
            stream=stream[0],
            values=[turn.expand(heads, -1, -1) for turn in values],
            down=Hadamard(linears["down"].in_features),
        )
        notes = [f"kurtosis of inputs {before:.3f} -> {after:.3f}, of values {value_before:.3f} -> {value_after:.3f}"]
        notes += [f"hidden states start at: {Hadamard(inputs.shape[-1]).how}", *online_notes(loaded, bases)]
        Fusion(loaded).install(bases)
        return [*notes, turn_keys_by_hadamard(loaded)]

    def loss(self, samples: Tensor, rotation: Tensor) -> Tensor:
        """The distance from the target for each sample [samples, rows, n], rotated by [samples or 1, n, n]."""
        distance = kurtosis(samples @ rotation).mean(-1) - self.target
        return distance.square() if self.squared else distance.abs()

    def descend(self, samples: Tensor, start: Tensor, draw: torch.Generator) -> tuple[Tensor, float, float]:
        """Rotations, and mean kurtosis before and after; samples [samples, rows, n], start [samples or 1, n, n].

        One rotation is learned for all samples together, several each for its own.
        """
        best = rotation = start.to(samples.device, torch.float32)
        lowest = self._whole(samples, best)
        first, second = torch.zeros_like(best), torch.zeros_like(best)
        every = max(1, self.steps // CHECKS)
        for index in range(1, self.steps + 1):
            chosen = torch.randperm(samples.shape[1], generator=draw)[: self.rows].to(samples.device)
            leaf = rotation.detach().requires_grad_()
            loss = self.loss(samples[:, chosen], leaf)
            # One rotation for all: their mean; one for each: independent losses.
            (loss.mean() if len(start) == 1 else loss.sum()).backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            first = MOMENTS[0] * first + (1 - MOMENTS[0]) * leaf.grad
            second = MOMENTS[1] * second + (1 - MOMENTS[1]) * leaf.grad.square()
            scaled = (second / (1 - MOMENTS[1] ** index)).sqrt() + EPSILON
            rotation = step(rotation, first / (1 - MOMENTS[0] ** index) / scaled, self.rate)
            if index % every == 0 or index == self.steps:
                here = self._whole(samples, rotation)
                better = here < lowest
                lowest = torch.where(better, here, lowest)
                best = torch.where(better[:, None, None], rotation, best)
        found = nearest_orthogonal(best)
        before, after = (float(kurtosis(samples @ r.float()).mean()) for r in (start.to(samples.device), found))
        return found, before, after

    @torch.no_grad()
    def _whole(self, samples: Tensor, rotation: Tensor) -> Tensor:
        """The loss on all rows for each rotation."""
        loss = self.loss(samples, rotation)
        return loss.mean(0, keepdim=True) if len(rotation) == 1 else loss


METHOD = KurTail


def kurtosis(rows: Tensor) -> Tensor:
    """[...] of rows [..., n]; 0 for constant ones."""
    centred = rows - rows.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return centred.pow(4).mean(-1) / (variance.square() + torch.finfo(rows.dtype).tiny)


def _rows(inputs: InputStatistics) -> Tensor:
    assert inputs.sample is not None
    return inputs.sample


def together(samples: list[Tensor]) -> Tensor:
    """[samples, rows, n], each row scaled to a root mean square of one, all with as many rows as the shortest has."""
    count = min(len(sample) for sample in samples)
    rows = torch.stack([sample[:count] for sample in samples]).float()
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
