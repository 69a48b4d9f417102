"""Architecture descriptions against transformers' own modules, for every supported family."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from qfarm.errors import NonFinite
from qfarm.models.architecture import absorbs_scale
from qfarm.models.load import LoadedModel, load
from qfarm.models.reference import resolve
from qfarm.walk import capture
from tests.conftest import TINY, save_tiny


def loaded(path: Path, dtype: str = "float32") -> LoadedModel:
    return load(resolve(str(path)), dtype, torch.device("cpu"))


@pytest.mark.parametrize("family", TINY)
def test_roles_cover_every_linear_of_a_block(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    for index, block in enumerate(model.blocks):
        linears = model.linears(index)
        inside = {id(module) for module in block.modules() if isinstance(module, torch.nn.Linear)}
        assert {id(linear) for linear in linears.values()} == inside
        assert all(model.model.get_submodule(model.module_name(index, role)) is linears[role] for role in linears)
    assert sorted(role for group in model.architecture.shared_inputs for role in group) == sorted(linears)


@pytest.mark.parametrize("family", TINY)
def test_shared_inputs_read_the_same_tensor(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, role=role: seen.__setitem__(role, args[0].clone()))
        for role, linear in model.linears(0).items()
    ]
    model.body(torch.arange(12)[None])
    for hook in hooks:
        hook.remove()
    for group in model.architecture.shared_inputs:
        assert all(torch.equal(seen[role], seen[group[0]]) for role in group)


@pytest.mark.parametrize("family", TINY)
def test_head_on_hidden_states_gives_the_logits(tiny_models: dict[str, Path], family: str) -> None:
    model = loaded(tiny_models[family])
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(model.head(model.body(ids)), model.model(ids, use_cache=False).logits)


@pytest.mark.parametrize("family", TINY)
def test_replaying_blocks_reproduces_the_model(tiny_models: dict[str, Path], family: str) -> None:
    """What calibration walks through is what the model computes, to the bit."""
    model = loaded(tiny_models[family])
    ids = torch.arange(96).reshape(2, 48)
    hidden, keywords = capture(model, ids)
    for block, options in zip(model.blocks, keywords, strict=True):
        out = block(hidden, **options)
        hidden = out[0] if isinstance(out, tuple) else out
    norm = model.model.base_model
    norm = getattr(norm, "decoder", norm)
    final = norm.final_layer_norm if family == "opt" else norm.norm
    assert torch.equal(model.head(final(hidden)), model.model(ids, use_cache=False).logits)


def test_mixed_attention_kinds_are_captured_per_block(tmp_path: Path) -> None:
    changes = {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    model = loaded(save_tiny(tmp_path, "qwen2", **changes))
    ids = torch.arange(64)[None]
    hidden, keywords = capture(model, ids)
    for block, options in zip(model.blocks, keywords, strict=True):
        out = block(hidden, **options)
        hidden = out[0] if isinstance(out, tuple) else out
    assert torch.equal(model.head(model.model.model.norm(hidden)), model.model(ids, use_cache=False).logits)


def test_replaced_weights_are_restored_to_the_bit(tiny: Path) -> None:
    model = loaded(tiny)
    ids = torch.arange(20)[None]
    before = model.body(ids)
    linear = model.linears(1)["down"]
    model.replace_weight(linear, torch.zeros_like(linear.weight))
    model.replace_weight(linear, torch.ones_like(linear.weight))  # twice: the first original counts
    assert not torch.equal(model.body(ids), before)
    model.restore()
    assert torch.equal(model.body(ids), before)
    model.restore()  # nothing left to do
    assert torch.equal(model.body(ids), before)


def test_only_originals_are_kept_and_what_is_temporary_goes(tiny: Path) -> None:
    model = loaded(tiny)
    linear = model.linears(0)["up"]
    original = linear.weight
    model.replace_weight(linear, torch.zeros_like(original))
    between = weakref.ref(linear.weight)
    model.replace_weight(linear, torch.ones_like(original))
    assert between() is None, "what a transform made costs no memory once a solver has replaced it"
    with pytest.raises(RuntimeError), model.temporary():
        model.replace_weight(linear, torch.full_like(original, 2))
        raise RuntimeError
    assert torch.equal(linear.weight, torch.ones_like(original))
    model.restore()
    assert linear.weight is original


def test_bytes_and_counts(tiny: Path) -> None:
    model = loaded(tiny, "bfloat16")
    linear_bytes = sum(linear.weight.numel() * 2 for i in range(2) for linear in model.linears(i).values())
    # Tied embeddings are one tensor.
    assert model.other_bytes() + linear_bytes == 2 * model.parameter_count()


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=r"layers\.1\.mlp\.up_proj"):
        loaded(folder)


@pytest.mark.parametrize(
    ("config", "roles", "expected"),
    [
        ({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}, ("o",), False),
        ({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}, ("o",), True),
        ({"model_type": "llama", "num_attention_heads": 4}, ("q", "k", "v"), True),
        ({"model_type": "opt", "activation_function": "relu", "do_layer_norm_before": True}, ("down",), True),
        ({"model_type": "opt", "activation_function": "gelu", "do_layer_norm_before": True}, ("down",), False),
        ({"model_type": "opt", "activation_function": "relu", "do_layer_norm_before": False}, ("up",), False),
    ],
)
def test_what_can_absorb_a_scale(config: dict[str, object], roles: tuple[str, ...], expected: bool) -> None:
    assert absorbs_scale(config, roles) is expected
