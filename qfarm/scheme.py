"""Scheme: what is quantized to how many bits.

Written as letters and widths: `w4`, `w4a16`, `w8a8`, `w4a4kv4`, `kv2`, `w4/8a8` (4-bit FFN, 8-bit attention),
`q8` (queries), `p8` (softmax probabilities). `a` means linear inputs. 16 means untouched.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from qfarm.errors import InvalidInput

UNTOUCHED = 16
_TOKEN = re.compile(r"(w|a|kv|q|p)(\d+)(?:/(\d+))?")
_FIELDS = {"w": "weight", "a": "linear_in", "kv": "kv_cache", "q": "q", "p": "probs"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Widths in bits, 1 to 16; 16 is untouched."""

    weight: int = UNTOUCHED  # every decoder linear, or only the FFN's when weight_attention is set
    weight_attention: int | None = None  # decoder attention projections, where they differ
    linear_in: int = UNTOUCHED
    kv_cache: int = UNTOUCHED
    q: int = UNTOUCHED
    probs: int = UNTOUCHED

    def __str__(self) -> str:
        """The canonical name: untouched sites are left out, `w16` when all are."""
        parts = []
        if self.weight != UNTOUCHED or self.weight_attention is not None:
            mixed = "" if self.weight_attention is None else f"/{self.weight_attention}"
            parts.append(f"w{self.weight}{mixed}")
        for letter in ("a", "kv", "q", "p"):
            bits = getattr(self, _FIELDS[letter])
            if bits != UNTOUCHED:
                parts.append(f"{letter}{bits}")
        return "".join(parts) or "w16"

    def weight_bits(self, role: str) -> int:
        """Width of a linear layer by its role (`q k v o` are attention, the rest FFN)."""
        if self.weight_attention is not None and role in ("q", "k", "v", "o"):
            return self.weight_attention
        return self.weight

    @property
    def weight_widths(self) -> tuple[int, ...]:
        """The distinct weight widths below 16."""
        widths = {self.weight, self.weight if self.weight_attention is None else self.weight_attention}
        return tuple(sorted(widths - {UNTOUCHED}))

    @property
    def sites(self) -> frozenset[str]:
        """The sites that this scheme quantizes."""
        touched = {name for name in ("linear_in", "kv_cache", "q", "probs") if getattr(self, name) != UNTOUCHED}
        return frozenset(touched | ({"weight"} if self.weight_widths else set()))


@functools.lru_cache(1024, typed=True)
def parse_scheme(text: str | int) -> Scheme:
    """Read a scheme; a bare number means weights (`4` is `w4`). Raises InvalidInput."""
    given = str(text).strip().lower()
    source = f"w{given}" if re.fullmatch(r"\d+(/\d+)?", given) else given
    values: dict[str, int | None] = {}
    end = 0
    for token in _TOKEN.finditer(source):
        letter, bits, second = token.group(1), int(token.group(2)), token.group(3)
        name = _FIELDS[letter]
        if token.start() != end or name in values or (second and letter != "w"):
            break
        widths = [bits, int(second)] if second else [bits]
        if any(not 1 <= width <= UNTOUCHED for width in widths):
            raise InvalidInput(f'scheme "{text}": widths are 1 to {UNTOUCHED} bits')
        values[name] = bits
        if second and int(second) != bits:
            values["weight_attention"] = int(second)
        end = token.end()
    if end != len(source) or not source:
        raise InvalidInput(f'scheme "{text}" is not understood; examples: w4, w4a16, w8a8, w4a4kv4, kv2, w4/8a8')
    return Scheme(**values)  # type: ignore[arg-type]  # values holds only the fields' own types
