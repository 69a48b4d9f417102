"""Past: the keyword by which transformers hands a model its KV cache, and where it gives it back.

The name changed in transformers 5.24, which ignores the older one beside the newer and drops it in 5.40. Callers from
outside (generation of transformers, lm-eval) may use either.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Cache

from qfarm.errors import ModelError

KEYWORDS = ("cache", "past_key_values")  # the one in use first


def cache_keyword(module: nn.Module) -> str:
    """The keyword that hands this module its cache. Raises ModelError when it has none that qfarm knows."""
    found = next((name for name in KEYWORDS if name in inspect.signature(module.forward).parameters), None)
    if found is None:
        raise ModelError(f"{type(module).__name__} takes no KV cache by the name of {' or '.join(KEYWORDS)}")
    return found


def given_cache(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among a call's keywords, by either name."""
    return next((kwargs[name] for name in KEYWORDS if kwargs.get(name) is not None), None)


def returned_cache(output: Any) -> Cache | None:
    """The cache that a model's output holds."""
    return next((output[name] for name in KEYWORDS if name in output), None)
