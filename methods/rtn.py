"""RTN, round to nearest: every weight goes to the nearest point of the min/max grid of its row or group.

No calibration, no optimisation. The baseline that every other method is compared with, and what quantizes a site
that the scheme names and no method of the recipe claims.

    scale = (high - low) / (2^b - 1)    zero = round(-low / scale)    code = clamp(round(w / scale) + zero, 0, 2^b - 1)

Stored: codes, scales, zero points (asymmetric); nothing else. The mathematics is qfarm.quantizer. `per_tensor` gives
the whole matrix one grid, as runs of qllm-infer do that leave out its flag for channels; it stores one scale and one
zero.

Differences from the 'nearest' branch of IST-DASLab/gptq: symmetric grids are restricted to +-(2^(b-1) - 1), so both
ends are exact (`convention` gives the reference's), and the scale is rounded to its storage dtype before the weights.
"""

from __future__ import annotations

import dataclasses

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from qfarm.inputs import InputStatistics
from qfarm.quantized import UniformWeight
from qfarm.quantizer import Convention, Grid
from qfarm.recipe import STRICT, WeightSolver


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RTN(WeightSolver):
    source = "the 'nearest' branch of github.com/IST-DASLab/gptq"
    later = frozenset({"per_tensor"})
    claims = frozenset()  # it rounds whichever site the scheme quantizes

    search: bool = Field(False, description="search a clipped range per group, error norm 2.4 (GPTQ's mse option)")
    convention: Convention = Field("restricted", description="symmetric grid: restricted, full_range_offset, deepspeed")
    per_tensor: bool = Field(False, description="one grid for the whole matrix instead of one per row")

    @property
    def stackable(self) -> bool:
        return not self.per_tensor

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        if self.per_tensor and group_size != -1:
            return "per_tensor has a single grid; use group size -1"
        return None

    def quantize_linear(self, weight: Tensor, inputs: InputStatistics | None, grid: Grid) -> UniformWeight:
        grid = dataclasses.replace(grid, search=self.search, convention=self.convention)
        if not self.per_tensor:
            return grid.quantize(weight)
        flat = grid.quantize(weight.reshape(1, -1))  # scale and zero [1, 1]
        return dataclasses.replace(flat, codes=flat.codes.reshape(weight.shape))


METHOD = RTN
