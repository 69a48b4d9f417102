"""Sites in running models of every family: nothing changes at 16 bits, nothing is left behind, nothing is missed."""

from __future__ import annotations

import gc
import inspect
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

from qfarm.errors import InvalidInput, ModelError, QfarmError
from qfarm.evaluate.generation import greedy
from qfarm.inputs import Statistic
from qfarm.layers import attention as attention_module
from qfarm.layers.attention import NAME, SETTINGS, add_to_sites, attention
from qfarm.layers.cache import QuantizedLayer, RTNLayer, SimulatedLayer, extend
from qfarm.layers.inject import install_cache, stored_bits
from qfarm.layers.install import install_sites
from qfarm.layers.kernel import PerTensor
from qfarm.layers.linear import Branch, QuantLinear, ReadBySeveral, quantize_input, transform_input
from qfarm.layers.observe import observe
from qfarm.layers.rope import rotate, unrotate
from qfarm.layers.rtn import Asymmetric, Quantizer, Symmetric
from qfarm.layers.sites import Observed, Place
from qfarm.models import past
from qfarm.models.load import LoadedModel
from qfarm.recipe import ActivationMethod, Recipe
from qfarm.scheme import parse_scheme
from qfarm.tasks.model import SessionLM
from qfarm.worker import Session
from tests.conftest import TINY, save_tiny
from tests.test_models import loaded
from tests.test_perplexity import make_cell

IDS = torch.randint(0, 256, (2, 24), generator=torch.manual_seed(0))
EVERYTHING = "a8kv4q8p8"
every_family = pytest.mark.parametrize("family", TINY)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@torch.no_grad()
def logits(model: LoadedModel, ids: Tensor = IDS, **options: Any) -> Tensor:
    out: Tensor = model.model(ids, **options).logits
    return out


def padded(count: int) -> tuple[Tensor, Tensor]:
    """IDS behind `count` padding tokens, and the mask."""
    ids = torch.cat([torch.full((len(IDS), count), 257), IDS], dim=1)
    return ids, (torch.arange(ids.shape[1]) >= count).long().expand_as(ids)


def in_every_way(model: LoadedModel, new_tokens: int = 8) -> list[Tensor]:
    """Logits of one pass, of one behind left padding and token by token; greedy and beam search behind left padding."""
    ids, mask = padded(3)
    generate = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 257, "attention_mask": mask[:, :9]}
    with torch.no_grad(), model.reading_cache("quantized", chunk=1):
        decoded = model.head(model.body(IDS))
    return [
        logits(model),
        logits(model, ids, attention_mask=mask)[:, 3:],
        decoded,
        model.model.generate(ids[:, :9], **generate),
        model.model.generate(ids[:, :9], num_beams=3, **generate),
    ]


class Plain(QuantizedLayer):
    """Stores what it is given."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        extend(self.state, {"k": keys, "v": values})

    def read(self) -> tuple[Tensor, Tensor]:
        return self.state["k"], self.state["v"]


class BeforeRope(Plain):
    pre_rope = True


class Sink(Plain):
    """All tokens but the first real one of each sequence rounded, before the rotary embedding."""

    pre_rope = True

    def append(self, keys: Tensor, values: Tensor) -> None:
        position = torch.arange(self.length, self.length + keys.shape[-2])
        starts = torch.zeros(len(keys), dtype=torch.int64) if self.starts is None else self.starts
        first = (position == starts[:, None])[:, None, :, None]
        quantize = Symmetric(bits=3)
        super().append(torch.where(first, keys, quantize(keys)), torch.where(first, values, quantize(values)))


# -- attention --------------------------------------------------------------------------------------------------------


@every_family
def test_attention_without_quantizers_is_eager_attention(model: LoadedModel) -> None:
    ids, mask = padded(5)
    model.model.set_attn_implementation("eager")
    expected, expected_padded = logits(model), logits(model, ids, attention_mask=mask)[:, 5:]
    model.model.set_attn_implementation("sdpa")
    add_to_sites(model, 0, q=lambda q: q)
    assert model.model.config._attn_implementation == NAME
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[:, 5:], expected_padded, rtol=0, atol=1e-5)


@every_family
def test_attention_does_not_see_the_future(model: LoadedModel) -> None:
    install_sites(model, Recipe(), parse_scheme(EVERYTHING), {})
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    before, after = logits(model), logits(model, changed)
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])


def test_the_name_stands_in_both_registries(tiny: Path) -> None:
    add_to_sites(loaded(tiny), 0, q=lambda q: q)
    assert AttentionInterface()[NAME] is attention and NAME in AttentionMaskInterface()
    module = torch.nn.Module()
    setattr(module, SETTINGS, attention_module.AttentionSites())
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="without a mask"):
        attention(module, x, x, x, None)


def test_queries_and_probabilities_are_quantized_where_they_are_used() -> None:
    """Against the definition with repeated key and value heads, written out."""
    draw = torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (4, 2, 2))
    mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    module = torch.nn.Module()
    quantize_q, quantize_p = Symmetric(bits=4), Symmetric(bits=3)
    setattr(module, SETTINGS, attention_module.AttentionSites(q=quantize_q, probs=quantize_p))
    out, probs = attention(module, q, k, v, mask, scaling=0.3)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    expected = quantize_p((quantize_q(q) @ k.transpose(2, 3) * 0.3 + mask).softmax(-1))
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(out, (expected @ v).transpose(1, 2))


@pytest.mark.parametrize("quantize", [Symmetric(bits=3), Asymmetric(bits=3), PerTensor(bits=3)])
def test_keys_and_values_are_the_same_before_and_after_heads_are_repeated(quantize: Quantizer) -> None:
    draw = torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=draw) for heads in (4, 2, 2))
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]

    def whole(x: Tensor) -> Tensor:
        """PerTensor has a scale for each sequence of [batch, tokens, features]."""
        return quantize(x.flatten(1, 2)).reshape(x.shape) if isinstance(quantize, PerTensor) else quantize(x)

    module = torch.nn.Module()
    setattr(module, SETTINGS, attention_module.AttentionSites(k=whole, v=whole))
    grouped, _ = attention(module, q, k, v, mask)
    repeated, _ = attention(module, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask)
    assert torch.equal(whole(k).repeat_interleave(2, 1), whole(k.repeat_interleave(2, 1)))
    torch.testing.assert_close(grouped, repeated, rtol=0, atol=1e-6)  # products of other shapes, hence last bits
    plain, _ = (setattr(module, SETTINGS, attention_module.AttentionSites()), attention(module, q, k, v, mask))[1]
    assert (grouped - plain).abs().max() > 0.05


# -- cache ------------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("layer", [Plain, BeforeRope])
def test_a_cache_that_rounds_nothing_changes_nothing(model: LoadedModel, layer: type[QuantizedLayer]) -> None:
    expected = in_every_way(model)
    install_cache(model, [layer] * 2)
    for found, plain in zip(in_every_way(model), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=0, atol=3e-5)


@every_family
def test_the_cache_is_used_however_the_model_is_called(model: LoadedModel) -> None:
    made: list[QuantizedLayer] = []

    def make() -> QuantizedLayer:
        made.append(RTNLayer(4))
        return made[-1]

    install_cache(model, [make] * 2)
    made.clear()
    for call, tokens in [
        (lambda: model.model(IDS), 24),
        (lambda: model.model(IDS, use_cache=False), 24),
        (lambda: model.body(IDS), 24),
        (lambda: model.model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False), 8),
    ]:
        with torch.no_grad():
            call()
        assert [layer.length for layer in made] == [tokens] * 2, "one cache per forward and per generation"
        made.clear()
    with pytest.raises(InvalidInput, match="^a StaticCache was passed to a model whose KV cache is quantized$"):
        logits(model, past_key_values=StaticCache(config=model.model.config, max_cache_len=32))


def without_cache(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A hook that keeps the cache from an attention module, as a version with another name for it would."""
    return args, kwargs | dict.fromkeys(set(past.KEYWORDS) & set(kwargs))


def test_a_model_that_does_not_use_the_cache_is_refused_before_anything_is_measured(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tiny)
    hook = model.attention(1).register_forward_pre_hook(without_cache, with_kwargs=True)
    with pytest.raises(ModelError, match="^LlamaModel did not write to the quantized KV cache that it was given$"):
        install_cache(model, [Plain] * 2)
    model.restore()
    hook.remove()
    monkeypatch.setattr(past, "KEYWORDS", ("memory", "kv"))
    with pytest.raises(ModelError, match="^LlamaModel takes no KV cache by the name of memory or kv$"):
        install_cache(model, [Plain] * 2)


def test_a_pass_that_goes_around_the_cache_is_an_error(tiny: Path) -> None:
    model = loaded(tiny)
    install_cache(model, [Plain] * 2)
    model.attention(1).register_forward_pre_hook(without_cache, with_kwargs=True)
    with pytest.raises(ModelError, match="did not write to the quantized KV cache"):
        logits(model)


def test_keys_before_the_rotary_embedding_need_it(tiny_models: dict[str, Path]) -> None:
    """What is not handed over is not passed over: the layer would store keys that are turned."""
    for family in ("llama", "opt"):
        model = loaded(tiny_models[family])
        install_cache(model, [BeforeRope] * 2)  # OPT has no such embedding
        logits(model)
        model.attention(1)._forward_pre_hooks.clear()  # what hands it over
        if family == "opt":
            logits(model)
            continue
        with pytest.raises(ModelError, match="^BeforeRope was not handed the rotary embedding of the keys it is given"):
            logits(model)
    layer, keys = BeforeRope(), torch.ones(1, 1, 2, 4)
    layer.rotary, layer.rotation = True, (torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
    layer.update(keys, keys)
    with pytest.raises(ModelError, match="was not handed the rotary embedding"):  # that of earlier tokens will not do
        layer.update(keys, keys)


@pytest.mark.parametrize("chunk", [None, 8])
def test_the_model_is_handed_its_cache_by_the_name_in_use(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    """The older name is dropped in transformers 5.40."""
    session = Session(None)
    session.begin(make_cell(tiny))
    body, names = session.loaded.model.base_model, set()
    body.register_forward_pre_hook(lambda module, args, kwargs: names.update(kwargs), with_kwargs=True)
    with torch.no_grad(), session.loaded.reading_cache("windowed", chunk):
        session.loaded.body(IDS)
    greedy(session, IDS, 2)
    SessionLM(session.loaded, 512).loglikelihood([SimpleNamespace(args=("a b", c)) for c in (" c d", " d e f", " d")])
    used = past.cache_keyword(body)
    assert used == next(iter(set(inspect.signature(type(body).forward).parameters) & set(past.KEYWORDS)))
    assert set(past.KEYWORDS) & names == {used}


def test_a_default_cache_that_the_caller_holds_gets_quantized_layers(tiny: Path) -> None:
    model = loaded(tiny)
    install_sites(model, Recipe(), parse_scheme("kv4"), {})
    with torch.no_grad():
        cache = DynamicCache(config=model.model.config)
        model.model(IDS[:, :20], past_key_values=cache, use_cache=True)
        assert all(isinstance(layer, RTNLayer) for layer in cache.layers) and cache.get_seq_length() == 20
        tail = model.model(IDS[:, 20:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(tail, logits(model)[:, 20:], rtol=0, atol=1e-4)


@every_family
def test_prefill_in_full_shows_no_error_in_one_forward_pass_and_quantized_does(model: LoadedModel) -> None:
    plain = logits(model)
    install_sites(model, Recipe(), parse_scheme("kv2"), {})
    with model.reading_cache("full"):
        assert torch.equal(logits(model), plain)
    assert (logits(model) - plain).abs().max() > 0.05
    with torch.no_grad(), model.reading_cache("windowed", chunk=8):
        windowed = model.head(model.body(IDS))
    # The first chunk sees its own keys as they are; later ones see what is stored.
    torch.testing.assert_close(windowed[:, :8], plain[:, :8], rtol=0, atol=1e-5)
    assert (windowed[:, 8:] - plain[:, 8:]).abs().max() > 0.05


@every_family
def test_token_by_token_equals_one_forward_pass(model: LoadedModel) -> None:
    """Every quantizer here is causal: what decoding sees is what one pass with a quantized prefill sees."""
    made = install_sites(model, Recipe(), parse_scheme(EVERYTHING), {})
    assert made.causal is True
    with torch.no_grad():
        at_once = model.body(IDS)
        with model.reading_cache("windowed", chunk=1):
            one_by_one = model.body(IDS)
    # Another batch shape moves last bits, and a rounding at a tie now and then by a whole step.
    error = (one_by_one - at_once).norm(dim=-1) / at_once.norm(dim=-1)
    assert float(error.median()) < 1e-5 and float(error.max()) < 0.1


@every_family
@pytest.mark.parametrize("scheme", ["kv4", "a8kv4q8p8"])
def test_left_padding_is_invisible(model: LoadedModel, scheme: str) -> None:
    install_sites(model, Recipe(), parse_scheme(scheme), {})
    ids, mask = padded(4)
    # Keys are quantized after the rotary embedding: the same tokens must stand at the same positions.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = (logits(model, ids, attention_mask=mask, position_ids=positions)[:, 4:] - logits(model)).abs()
    assert float(found.median()) < 1e-5


@every_family
def test_left_padding_is_invisible_to_rules_about_the_first_tokens(model: LoadedModel) -> None:
    ids, mask = padded(4)
    plain = logits(model)
    install_cache(model, [Sink] * 2)
    assert (logits(model) - plain).abs().max() > 0.05
    found = logits(model, ids, attention_mask=mask)
    assert float((found[:, 4:] - logits(model)).abs().median()) < 1e-5
    assert torch.equal(logits(model, ids, attention_mask=mask.bool()), found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_cache_holds_what_it_says(bits: int) -> None:
    layer = RTNLayer(bits)
    tensor = torch.randn(2, 3, 7, 32, generator=torch.manual_seed(0))
    keys, values = layer.update(tensor, -tensor)
    # Packed codes, two bytes for the scale and one for the zero point of each token and head.
    assert layer.stored_bytes() == 2 * (2 * 3 * 7) * (32 * bits // 8 + 3)
    low, high = tensor.amin(-1, keepdim=True).clamp(max=0), tensor.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    expected = (((tensor / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
    assert torch.equal(keys, expected) and values.shape == keys.shape
    again = layer.update(tensor[:, :, :1], tensor[:, :, :1])[0]
    assert torch.equal(again, torch.cat([expected, expected[:, :, :1]], dim=2))  # itself as well
    assert layer.get_seq_length() == 8


def test_what_transformers_does_to_a_cache_layer() -> None:
    layer = RTNLayer(4)
    tensor = torch.randn(2, 3, 7, 32, generator=torch.manual_seed(0))
    before, _ = layer.update(tensor, tensor)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.read()[0], before[[1, 0]])
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.read()[0], before[[1, 0]])
    layer.crop(-2)
    assert layer.get_seq_length() == 5 and torch.equal(layer.read()[0], before[[1, 0], :, :5])
    layer.offload()
    layer.prefetch()
    assert layer.get_mask_sizes(3) == (8, 0)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.stored_bytes() == 0
    assert torch.equal(layer.update(tensor, tensor)[0], before)
    plain = Plain()
    plain.update(tensor, tensor)
    with pytest.raises(InvalidInput, match="assisted decoding is not supported"):
        plain.crop(-1)
    with pytest.raises(InvalidInput, match="^a cache gives back -n tokens, got 2$"):  # the length to keep, it once was
        layer.crop(2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_stored_bits_are_counted_on_real_layers(model: LoadedModel) -> None:
    width = model.head_dim
    assert stored_bits(model, [lambda: RTNLayer(4)] * 2, tokens=64) == pytest.approx(4 + 24 / width)
    assert install_sites(model, Recipe(), parse_scheme("a8"), {}).kv_bits is None


def test_unknown_kinds_of_blocks_are_refused(tiny: Path) -> None:
    model = loaded(tiny)
    model.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="the model has linear_attention blocks"):
        install_cache(model, [Plain] * 2)


ROPE = {
    "default": {},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_rotary_embedding_is_undone_and_done_again(tmp_path: Path, family: str, kind: str) -> None:
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, **ROPE[kind]}
    model = loaded(save_tiny(tmp_path, family, rope_parameters=scaling, num_hidden_layers=1))
    plain = logits(model)
    seen: dict[str, Tensor] = {}

    class Spy(BeforeRope):
        def append(self, keys: Tensor, values: Tensor) -> None:
            seen["undone"] = keys
            super().append(keys, values)

    def listen(module: Any, args: Any, output: Tensor) -> None:
        seen["made"] = output

    install_cache(model, [Spy])
    handle = model.key_maker(0).register_forward_hook(listen)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)
    handle.remove()
    undone = seen["undone"].transpose(1, 2)
    torch.testing.assert_close(undone, seen["made"].reshape(undone.shape), rtol=0, atol=1e-5)


def test_rotations_move_with_their_sequences() -> None:
    """Sequences that start at other positions have other rotations, and keep them when the batch is reordered."""
    draw = torch.manual_seed(0)
    angle = torch.randn(2, 5, 8, generator=draw).repeat(1, 1, 2)
    keys = torch.randn(2, 3, 5, 16, generator=draw)
    layer = BeforeRope()
    layer.rotation = angle.cos(), angle.sin()
    layer.update(keys, keys)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.rotation = angle[:, :1].cos(), angle[:, :1].sin()
    found, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    torch.testing.assert_close(found[:, :, :5], keys[[1, 0]], rtol=0, atol=1e-5)


def test_rotations_of_a_batch_may_be_followed_by_those_of_its_sequences() -> None:
    """As when a prompt is read without positions and continued by `generate`, which gives them by sequence."""
    angle = torch.randn(2, 1, 8, generator=torch.manual_seed(0)).repeat(1, 1, 2)
    keys = torch.randn(2, 3, 6, 16, generator=torch.manual_seed(1))
    layer = BeforeRope()
    for rows, part in ((1, keys[:, :, :4]), (2, keys[:, :, 4:5]), (1, keys[:, :, 5:])):
        table = angle[:rows].expand(-1, part.shape[2], -1)
        layer.rotation = table.cos(), table.sin()
        found, _ = layer.update(part, part)
    torch.testing.assert_close(found, keys, rtol=0, atol=1e-5)


def test_rotation_and_back_for_scaled_tables() -> None:
    angle = torch.randn(1, 5, 8, generator=torch.manual_seed(0)).repeat(1, 1, 2)
    rotation = 1.3 * angle.cos(), 1.3 * angle.sin()
    keys = torch.randn(2, 3, 5, 16, generator=torch.manual_seed(1))
    torch.testing.assert_close(unrotate(rotate(keys, rotation), rotation), keys, rtol=0, atol=1e-6)


# -- linear inputs ----------------------------------------------------------------------------------------------------


@every_family
def test_linear_layers_that_round_nothing_give_the_same_bits(model: LoadedModel) -> None:
    plain = logits(model)
    for block in range(2):
        for role in model.linears(block):
            quantize_input(model, block, role, lambda x: x)
    assert all(isinstance(linear, QuantLinear) for linear in model.linears(0).values())
    assert torch.equal(logits(model), plain)


def test_a_quantized_linear_is_its_definition() -> None:
    linear = torch.nn.Linear(16, 6)
    branch = Branch(left=torch.randn(6, 2), right=torch.randn(2, 16))
    x = torch.randn(3, 4, 16)
    quantize = Symmetric(bits=3)
    made = QuantLinear.around(linear, quantize, branch)
    assert (made.in_features, made.out_features, made.weight, made.bias) == (16, 6, linear.weight, linear.bias)
    expected = linear(quantize(x)) + (x @ branch.right.T) @ branch.left.T  # the branch sees x as it is
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made(x[0]), expected[0])  # OPT's MLP is flat
    linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight))
    assert made.weight is linear.weight


def test_a_transform_of_the_input_comes_before_the_quantizer(tiny: Path) -> None:
    model = loaded(tiny)
    order: list[str] = []

    def note(name: str) -> Quantizer:
        def function(x: Tensor) -> Tensor:
            order.append(name)
            return x

        return function

    quantize_input(model, 0, "down", note("quantize"))
    transform_input(model, 0, "down", note("transform"))
    logits(model)
    assert order == ["transform", "quantize"]


def test_what_is_added_to_attention_comes_after_what_is_there(tiny: Path) -> None:
    """A rotation of queries stays when they are quantized or observed."""
    model = loaded(tiny)
    add_to_sites(model, 0, q=lambda q: 2 * q)
    add_to_sites(model, 0, q=lambda q: q + 1)
    sites: attention_module.AttentionSites = getattr(model.attention(0), SETTINGS)
    assert sites.q is not None and sites.q(torch.ones(1)).item() == 3
    assert getattr(model.attention(1), SETTINGS) == attention_module.AttentionSites()


def test_a_branch_stays_when_the_input_is_quantized_later(tiny: Path) -> None:
    model = loaded(tiny)
    branch = Branch(left=torch.zeros(64, 1), right=torch.zeros(1, 128))
    quantize_input(model, 0, "down", lambda x: x, branch)
    install_sites(model, Recipe(), parse_scheme("a4"), {})
    made = model.linears(0)["down"]
    assert isinstance(made, QuantLinear) and made.branch is branch and made.quantize == Symmetric(bits=4)


@every_family
def test_every_decoder_linear_and_only_those_are_quantized(model: LoadedModel) -> None:
    install_sites(model, Recipe(), parse_scheme("a8"), {})
    changed = {name for name, module in model.model.named_modules() if isinstance(module, QuantLinear)}
    assert changed == {model.module_name(block, role) for block in range(2) for role in model.architecture.roles}
    assert not isinstance(model.head, QuantLinear)


def test_an_input_that_several_layers_read_is_rounded_once_and_let_go() -> None:
    given: list[Tensor] = []
    once = ReadBySeveral(lambda x: (given.append(x), x + 1)[1], readers=3)  # type: ignore[func-returns-value]
    first, second = torch.zeros(2), torch.ones(2)
    results = [once(first), once(first), once(first), once(second)]
    assert [r.tolist() for r in results] == [[1, 1]] * 3 + [[2, 2]] and results[0] is results[2]
    assert once(first).tolist() == [1, 1]  # whoever comes out of turn gets the right numbers too
    assert [x.tolist() for x in given] == [[0, 0], [1, 1], [0, 0]]
    watched = weakref.ref(results[0])
    once(first), once(first)
    del results
    gc.collect()
    assert watched() is None and once._latest is None


@every_family
def test_layers_that_read_one_input_share_its_quantizer_unless_they_differ(model: LoadedModel) -> None:
    install_sites(model, Recipe(), parse_scheme("a4"), {})
    shared = logits(model)
    for group in model.architecture.shared_inputs:
        quantizers = {role: model.linears(1)[role].quantize for role in group}
        assert len({id(q) for q in quantizers.values()}) == 1
        assert isinstance(quantizers[group[0]], ReadBySeveral) == (len(group) > 1)
    model.restore()
    for block in range(2):
        for role in model.architecture.roles:
            quantize_input(model, block, role, Symmetric(bits=4))
    assert torch.equal(logits(model), shared)
    model.restore()
    transform_input(model, 1, "k", lambda x: x + 0)  # k gets a tensor of its own
    install_sites(model, Recipe(), parse_scheme("a4"), {})
    assert all(isinstance(model.linears(1)[role].quantize, Symmetric) for role in "qkv")


# -- everything together ----------------------------------------------------------------------------------------------


def state(model: LoadedModel) -> list[Any]:
    """What installing might leave behind."""
    modules = dict(model.model.named_modules())
    return [
        [(name, id(module), type(module)) for name, module in modules.items()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules.values()],
        [id(p) for p in model.model.parameters()],
        [hasattr(m, SETTINGS) for m in modules.values()],
        model.model.config._attn_implementation,
        model.prefill,
        model.chunk,
    ]


@every_family
@pytest.mark.parametrize("scheme", ["a8", "kv4", "q4", "p4", EVERYTHING])
def test_uninstalling_leaves_no_trace(model: LoadedModel, scheme: str) -> None:
    before, plain = state(model), logits(model)
    install_sites(model, Recipe(), parse_scheme(scheme), {})
    assert not torch.equal(logits(model), plain)
    model.restore()
    assert state(model) == before and torch.equal(logits(model), plain)


def test_uninstalling_after_a_failure_half_way(tiny: Path) -> None:
    class Broken(ActivationMethod):
        def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
            if place.layer == 1:
                raise RuntimeError("half-way")
            return Symmetric(bits=bits)

    model = loaded(tiny)
    before, plain = state(model), logits(model)
    # kv_cache comes before linear_in and is installed by then.
    with pytest.raises(RuntimeError, match="half-way"):
        install_sites(model, Recipe((Broken(),)), parse_scheme("a8kv4"), {})
    model.restore()
    assert state(model) == before and torch.equal(logits(model), plain)


def test_more_bits_are_closer(tiny: Path) -> None:
    model = loaded(tiny)
    plain = logits(model)
    for site in ("a", "kv", "q", "p"):
        errors = []
        for bits in (2, 4, 6, 8):
            install_sites(model, Recipe(), parse_scheme(f"{site}{bits}"), {})
            errors.append(float((logits(model) - plain).square().mean()))
            model.restore()
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]


class Keys(ActivationMethod):
    """Keys alone, by one of the three ways into the cache."""

    claims = frozenset({"kv_cache"})
    way = "k"

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
        return Symmetric(bits=bits) if place.site == self.way else None


class KeysBeforeRope(Keys):
    way = "k_pre_rope"


@every_family
def test_keys_are_quantized_before_or_after_the_rotary_embedding(model: LoadedModel) -> None:
    plain = logits(model)
    made = install_sites(model, Recipe((Keys(),)), parse_scheme("kv4"), {})
    assert made.kv_bits is None  # simulated: nothing is stored in 4 bits
    after = logits(model)
    model.restore()
    install_sites(model, Recipe((KeysBeforeRope(),)), parse_scheme("kv4"), {})
    before = logits(model)
    assert not torch.equal(after, plain) and not torch.equal(before, plain)
    # Without a rotary embedding both are the same tensor.
    assert torch.equal(before, after) == (model.model.config.model_type == "opt")


def test_who_leaves_places_alone_says_so(tiny: Path) -> None:
    class NotDown(ActivationMethod):
        def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
            return None if place.role == "down" else Symmetric(bits=bits)

    class Nothing(ActivationMethod):
        def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
            return None

    model = loaded(tiny)
    made = install_sites(model, Recipe((NotDown(),)), parse_scheme("a8"), {})
    assert made.notes == ("test_layers leaves linear_in down of layers [0, 1] at 16 bits",) and made.causal is True
    with pytest.raises(QfarmError, match="^test_layers claims linear_in but quantizes nothing there$"):
        install_sites(model, Recipe((Nothing(),)), parse_scheme("a8"), {})
    model.restore()


def test_a_quantizer_that_looks_across_tokens_marks_the_cell(tiny: Path) -> None:
    class PerColumn(ActivationMethod):
        causal = False

        def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
            return lambda x: Symmetric(bits=bits)(x.transpose(-1, -2)).transpose(-1, -2)

    model = loaded(tiny)
    assert install_sites(model, Recipe((PerColumn(),)), parse_scheme("a4q8"), {}).causal is False
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    assert not torch.equal(logits(model)[:, :-1], logits(model, other)[:, :-1])


# -- observing --------------------------------------------------------------------------------------------------------


def test_each_token_is_observed_once_in_models_that_are_run_through(tmp_path: Path) -> None:
    """A model that mixes kinds of attention is run as a whole before the walk."""
    kinds = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    model = loaded(save_tiny(tmp_path, "qwen2", **kinds))
    found = observe(model, IDS, frozenset({Statistic.MEAN_ABS}), sites=("k", "linear_in"))
    assert {stats.tokens for stats in found.values()} == {IDS.numel()}


@every_family
def test_what_is_observed_is_what_passes_by(model: LoadedModel) -> None:
    """Against hooks and a recording cache on plain forward passes."""
    windows = torch.randint(0, 256, (4, 12), generator=torch.manual_seed(1))
    before = state(model)
    wanted = frozenset({Statistic.MAX_ABS})
    sites = ("linear_in", "q", "k", "v", "k_pre_rope")
    found = observe(model, windows, wanted, sites=sites, batch_tokens=24)
    assert state(model) == before
    assert {place.site for place in found} == set(sites)
    inputs: dict[Place, Tensor] = {}

    def listener(place: Place) -> Any:
        def hook(module: Any, args: Any) -> None:
            inputs[place] = args[0].reshape(-1, args[0].shape[-1]).abs().amax(0)

        return hook

    for block in range(2):
        for role, linear in model.linears(block).items():
            handle = linear.register_forward_pre_hook(listener(Place("linear_in", block, role)))
            model.on_restore(handle.remove)
    caches: list[SimulatedLayer] = []

    def make() -> SimulatedLayer:
        caches.append(SimulatedLayer(None, None))
        return caches[-1]

    install_cache(model, [make] * 2)
    caches.clear()
    logits(model, windows)
    for place, largest in inputs.items():
        torch.testing.assert_close(found[place].max_abs, largest, rtol=1e-4, atol=1e-5)
    for block, layer in enumerate(caches):
        for site, tensor in zip(("k", "v"), layer.read(), strict=True):
            largest = tensor.abs().amax(dim=(0, 2)).reshape(-1)  # [heads x head_dim]
            torch.testing.assert_close(found[Place(site, block)].max_abs, largest, rtol=1e-4, atol=1e-5)
            assert found[Place(site, block)].tokens == windows.numel()
