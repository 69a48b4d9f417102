"""Fusing: rotated models compute what they did, in every family, and come back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qfarm.errors import QfarmError
from qfarm.fuse import AcrossHeads, Bases, Fusion
from qfarm.hadamard import Hadamard, random_hadamard, random_orthogonal
from qfarm.inputs import Statistic
from qfarm.layers.cache import SimulatedLayer
from qfarm.layers.inject import install_cache
from qfarm.layers.install import install_sites
from qfarm.layers.observe import observe
from qfarm.layers.sites import Place
from qfarm.layers.turn import Turn
from qfarm.models.architecture import rotation_rule
from qfarm.models.load import LoadedModel
from qfarm.recipe import Recipe
from qfarm.scheme import parse_scheme
from tests.conftest import TINY, save_tiny
from tests.test_models import loaded

PROBE = torch.randint(0, 256, (2, 30), generator=torch.manual_seed(1))
# What decides about the fold: biases of q, k, v (Qwen2), biases everywhere with tied embeddings, MLP sizes with a
# Paley factor, heads without a Hadamard matrix.
CASES = {
    **{family: (family, {}) for family in TINY},
    "llama, biases, 152": ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 152}),
    "qwen2, tied, 176": ("qwen2", {"tie_word_embeddings": True, "intermediate_size": 176}),
    "llama, 3 heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}),
    "opt, no biases": ("opt", {"enable_bias": False}),
}


def lively(model: LoadedModel) -> LoadedModel:
    """With norms that are not all ones, some of them negative, and biases that are not zero."""
    draw = torch.manual_seed(3)
    for name, parameter in model.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5 + ("norm" in name) * 0.3)
    return model


@pytest.fixture(params=CASES)
def model(tmp_path: Path, request: pytest.FixtureRequest) -> LoadedModel:
    family, changes = CASES[request.param]
    return lively(loaded(save_tiny(tmp_path, family, **changes)))


@torch.no_grad()
def logits(model: LoadedModel, ids: Tensor = PROBE) -> Tensor:
    out: Tensor = model.model(ids).logits
    return out


def sizes(model: LoadedModel) -> tuple[int, int, int, int, int]:
    """Hidden size, MLP size, query heads, key/value heads, head width."""
    linears, width = model.linears(0), model.head_dim
    q, k = linears["q"], linears["k"]
    return q.in_features, linears["down"].in_features, q.out_features // width, k.out_features // width, width


def all_bases(model: LoadedModel, seed: int = 0) -> Bases:
    """Every rotation at once, each value head with its own."""
    hidden, mlp, heads, kv, width = sizes(model)
    draw = torch.Generator().manual_seed(seed)
    values = [torch.stack([random_orthogonal(width, draw) for _ in range(kv)]) for _ in model.blocks]
    across = Hadamard(heads) if Hadamard(heads).exact else None
    return Bases(stream=random_hadamard(hidden, draw), values=values, down=Hadamard(mlp), across=across)


def turn_of(model: LoadedModel) -> Turn:
    hadamard = Hadamard(model.head_dim)
    return Turn(forward=hadamard, back=hadamard.back)


def test_the_model_computes_the_same_and_comes_back(model: LoadedModel) -> None:
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    plain, count, tied = logits(model), model.parameter_count(), model.model.config.tie_word_embeddings
    Fusion(model).install(all_bases(model))
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    after = model.model.state_dict()
    same = [n for n, v in before.items() if n in after and torch.equal(after[n], v)]
    untouched = {"q_norm", "k_norm"}
    assert all(any(word in name for word in untouched) for name in same if "bias" not in name), same
    assert model.parameter_count() == count and model.head.weight is not model.model.get_input_embeddings().weight
    model.restore()
    again = model.model.state_dict()
    assert again.keys() == before.keys() and all(torch.equal(before[name], value) for name, value in again.items())
    assert torch.equal(logits(model), plain) and model.model.config.tie_word_embeddings == tied
    assert (model.head.weight is model.model.get_input_embeddings().weight) == tied


def norm_in_double(module: Any) -> None:
    """Have an RMS norm of transformers compute in double precision; its own forward goes by float32."""
    epsilon = module.variance_epsilon
    module.forward = lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def test_in_double_precision_nothing_is_lost(model: LoadedModel) -> None:
    for module in model.model.double().modules():
        if hasattr(module, "variance_epsilon"):
            norm_in_double(module)
    plain = logits(model)
    Fusion(model).install(all_bases(model))
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-12 * max(1.0, float(plain.abs().max())))


def test_greedy_text_is_the_same(tiny_models: dict[str, Path]) -> None:
    model = lively(loaded(tiny_models["qwen3"]))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    plain = model.model.generate(PROBE, **options)
    Fusion(model).install(all_bases(model))
    assert torch.equal(model.model.generate(PROBE, **options), plain)


def test_folding_alone_is_exact_and_temporary(model: LoadedModel) -> None:
    """What statistics behind the fold are taken of; the norms' outputs have a root mean square of one there."""
    plain = logits(model)
    with model.temporary():
        Fusion(model).install(Bases())
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
        found = observe(model, PROBE, frozenset({Statistic.SAMPLE}))
        sample = found[Place("linear_in", 1, "q")].sample
        assert sample is not None
        torch.testing.assert_close(sample.square().mean(1), torch.ones(len(sample)), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(model), plain)


def test_centring_would_change_a_model_with_rms_norms(tiny: Path) -> None:
    model = lively(loaded(tiny))
    plain = logits(model)
    fusion = Fusion(model)
    assert not fusion.centred
    fusion.centred = True
    fusion.install(all_bases(model))
    assert float((logits(model) - plain).abs().max()) > 1e-2


def test_a_model_is_rotated_once(tiny: Path) -> None:
    model = loaded(tiny)
    Fusion(model).install(all_bases(model))
    with pytest.raises(QfarmError, match="^the model is rotated already$"):
        Fusion(model)
    model.restore()
    Fusion(model)


def test_parameters_are_differentiable_in_the_rotations(tiny: Path) -> None:
    """The logits do not move along the orthogonal group: gradients are symmetric against R. All fusing is checked."""
    model = lively(loaded(tiny))
    fusion = Fusion(model)
    bases = all_bases(model)
    assert bases.stream is not None and bases.values is not None
    stream = bases.stream.float().requires_grad_()
    values = [turns.float().requires_grad_() for turns in bases.values]
    names = {id(module): name for name, module in model.model.named_modules()}
    made = fusion.parameters(Bases(stream=stream, values=values, down=bases.down), torch.float32)
    parameters = {f"{names[id(module)]}.{name}": value for module, name, value in made}
    fusion.install_online(Bases(down=bases.down))
    out = torch.func.functional_call(model.model, parameters, (PROBE,), tie_weights=False).logits
    torch.nn.functional.cross_entropy(out.flatten(0, 1), PROBE.roll(1, 1).flatten()).backward()
    for rotation in (stream, *(turns for turns in values)):
        assert rotation.grad is not None
        along = rotation.grad @ rotation.detach().transpose(-1, -2)
        scale = float(rotation.grad.abs().max())
        assert scale > 1e-5 and float((along - along.transpose(-1, -2)).abs().max()) < 1e-2 * scale + 1e-6


# -- online -----------------------------------------------------------------------------------------------------------


def test_statistics_are_observed_behind_online_transforms(tiny: Path) -> None:
    model = loaded(tiny)
    wanted = frozenset({Statistic.HESSIAN})
    plain = observe(model, PROBE, wanted)
    bases = all_bases(model)
    Fusion(model).install(bases)
    turned = observe(model, PROBE, wanted)
    for role, matrix in (("down", bases.down), ("q", bases.stream), ("up", bases.stream)):
        dense = matrix.dense() if isinstance(matrix, Hadamard) else matrix
        assert dense is not None
        before, after = (found[Place("linear_in", 1, role)].hessian for found in (plain, turned))
        assert before is not None and after is not None
        expected = dense.T @ before.double() @ dense
        if role == "down":  # norms are ones in this model, so nothing but the rotation lies in between
            assert not turned[Place("linear_in", 1, role)].foldable and plain[Place("linear_in", 1, role)].foldable
        torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_heads_are_mixed_and_their_channels_are_not() -> None:
    x = torch.randn(2, 5, 4 * 6, generator=torch.manual_seed(0), dtype=torch.float64)
    mixed = AcrossHeads(Hadamard(4), 6)(x)
    matrix = torch.kron(Hadamard(4).dense(), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(mixed, x @ matrix)


@pytest.mark.parametrize("family", TINY)
def test_turned_keys_are_quantized_turned(tiny_models: dict[str, Path], family: str) -> None:
    """At 8 bits the turn costs nothing; and with an outlier channel in the keys it gains at 3 bits."""
    model = lively(loaded(tiny_models[family]))
    plain = logits(model)
    turn = turn_of(model)

    def error(scheme: str, turned: bool) -> float:
        if turned:
            model.turns = dict.fromkeys(range(len(model.blocks)), turn)
        install_sites(model, Recipe(), parse_scheme(scheme), {})
        found = float((logits(model) - plain).square().mean())
        model.restore()
        model.turns = {}
        return found

    assert 0 < error("kv8", True) < 1e-2 * error("kv3", True)
    assert error("kv4", True) != error("kv4", False) and error("q4", True) != error("q4", False)


@pytest.mark.parametrize("family", TINY)
def test_turned_keys_without_rounding_are_the_keys(tiny_models: dict[str, Path], family: str) -> None:
    """Fused, online and in the cache, at once: in one pass and token by token."""
    model = lively(loaded(tiny_models[family]))
    plain = logits(model)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 257}
    text = model.model.generate(PROBE, **options)
    Fusion(model).install(all_bases(model))
    model.turns = dict.fromkeys(range(len(model.blocks)), turn_of(model))
    seen: list[Tensor] = []
    install_cache(model, [lambda: SimulatedLayer(lambda keys: seen.append(keys) or keys, None)] * 2)  # type: ignore[func-returns-value]
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)
    assert torch.equal(model.model.generate(PROBE, **options), text)
    assert len(seen) == 2 * (1 + 6) and seen[0].shape[-1] == model.head_dim


def test_a_turn_is_seen_by_observers_of_queries_and_keys(tiny: Path) -> None:
    model = loaded(tiny)
    wanted, sites = frozenset({Statistic.HESSIAN}), ("k", "v")
    plain = observe(model, PROBE, wanted, sites=sites)
    model.turns = {0: turn_of(model)}
    turned = observe(model, PROBE, wanted, sites=sites)
    dense = torch.block_diag(*[Hadamard(model.head_dim).dense()] * 2).float()
    before, after = (found[Place("k", 0)].hessian for found in (plain, turned))
    assert before is not None and after is not None
    torch.testing.assert_close(after, dense.T @ before @ dense, rtol=1e-3, atol=1e-3)
    for place in (Place("k", 1), Place("v", 0)):
        before, after = plain[place].hessian, turned[place].hessian
        assert before is not None and after is not None and torch.equal(before, after)


def test_what_cannot_be_rotated_says_why() -> None:
    opt = {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "do_layer_norm_before": True}
    assert rotation_rule(opt) is None and rotation_rule({"model_type": "llama"}) is None
    for change, words in (
        ({"do_layer_norm_before": False}, "post-norm"),
        ({"word_embed_proj_dim": 32}, "different widths"),
        ({"_remove_final_layer_norm": True}, "no norm before its head"),
    ):
        assert words in (rotation_rule(opt | change) or "")
