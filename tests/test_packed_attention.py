"""Attention over a packed KV cache: what words hold, refusals, models with torch's arithmetic in the kernels' place.

The kernels themselves: tests/test_kernels.py -k packed_cache.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qfarm.errors import Disagreement, ModelError
from qfarm.evaluate.crosscheck import Crosscheck
from qfarm.kernels import ops
from qfarm.layers import packed_attention
from qfarm.layers.cache import QuantizedLayer
from qfarm.layers.packed_run import PackedModel
from qfarm.methods.kivi import KIVILayer
from tests.test_packed_run import packed_model
from tests.test_worker import Farm

KIVI = "kivi: {{group: 32, residual: 32}}"


def noise(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, tokens, 32, generator=torch.manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_words_hold_the_codes_that_a_layer_has_without_them(bits: int, padded: bool) -> None:
    layers = [KIVILayer(bits, bits, group=32, residual=64) for _ in range(2)]
    for layer, in_words in zip(layers, (False, True), strict=True):
        layer.in_words, layer.starts = in_words, torch.tensor([0, 70]) if padded else None
        layer.update(noise(90), noise(90, 1))
        for step in range(50):
            layer.words_wanted = bool(step % 2)  # what is handed over changes nothing of what is stored
            found = layer.update(noise(1, 2 + step), noise(1, 100 + step))
            assert found[0].shape[2] == layer.length or (in_words and step % 2)
        assert layer.length == 140
    plain, words = layers
    assert words.state["k_word_codes"].shape[2] == 128 * bits // 32 and "k_codes" not in words.state
    assert words.state["v_word_codes"].shape[2] == 76 * bits // 32
    assert words.state["v_codes"].shape[2] == 76 % (32 // bits)
    for found, expected in zip(words.read(), plain.read(), strict=True):
        assert torch.equal(found, expected)
    assert words.stored_bytes() == plain.stored_bytes()
    for layer in layers:
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([3, 0, 1]))
        layer.update(noise(1, 7).repeat(2, 1, 1, 1)[:3], noise(1, 8).repeat(2, 1, 1, 1)[:3])
    assert all(torch.equal(found, expected) for found, expected in zip(words.read(), plain.read(), strict=True))


def ready(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, **changes: str
) -> tuple[Farm, PackedModel]:
    """A cell whose cache is read as a GPU would; its heads have 32 numbers."""
    monkeypatch.setattr(packed_attention, "refusal", packed_attention.unfit)
    given = {"methods": f"[{KIVI}]", "bits": "[kv4]", "group_sizes": "[-1]"} | changes
    farm, packed = packed_model(tmp_path, models["qwen3"], **given)
    farm.session.packed = packed
    return farm, packed


@torch.no_grad()
def read(farm: Farm, packed: PackedModel, run: bool) -> Tensor:
    """Logits of six tokens read one at a time behind 70, in words where it is a packed run."""
    model = farm.session.loaded.model
    ids = (torch.arange(2 * 76).reshape(2, 76) * 7 + 1) % 250
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found, past = [], None
    with packed.running(run):
        for start, stop in [(0, 70), *((at, at + 1) for at in range(70, 76))]:
            out = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            found.append(out.logits[:, -1].float())
    assert [isinstance(layer, QuantizedLayer) and layer.in_words for layer in past.layers] == [run] * 2
    return torch.stack(found[1:])


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries of each call for scores over packed keys."""
    shapes: list[tuple[int, ...]] = []
    real = ops.kv_scores

    def counted(queries: Tensor, *rest: object) -> Tensor:
        shapes.append(tuple(queries.shape))
        return real(queries, *rest)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(ops, "kv_scores", counted)
    return shapes


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_that_reads_words_is_the_simulated_one(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, scored: list[tuple[int, ...]]
) -> None:
    farm, packed = ready(tmp_path, tiny_models, monkeypatch)
    assert packed.notes()[-1].startswith("packed: KV cache: qfarm.kernels read it for one new token")
    before = farm.session.loaded.model.config._attn_implementation
    simulated = read(farm, packed, False)
    assert not scored
    found = read(farm, packed, True)
    assert scored == [(2 * 2, 2, 32)] * (2 * 6)
    assert 0 < (found - simulated).square().mean().sqrt() < 0.02 * simulated.std()
    assert farm.session.loaded.model.config._attn_implementation == before
    assert torch.equal(read(farm, packed, False), simulated)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_crosscheck_reads_as_far_as_words_reach(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, scored: list[tuple[int, ...]]
) -> None:
    """With the method's own residual window, beside quantized weights."""
    farm, packed = ready(tmp_path, tiny_models, monkeypatch, methods="[rtn+kivi]", bits="[w4kv2]")
    with packed.running(True), torch.no_grad():
        found = Crosscheck(length=24, windows=1).run(farm.session, lambda done, total: None)
    (apart,) = (metric for metric in found.metrics if metric.metric == "cache_difference")
    assert apart.value < 1e-4 and apart.n == 4  # torch's arithmetic in float32 on both sides
    assert len(scored) == 2 * 4  # two blocks, four tokens
    limit = farm.session.loaded.model.config
    monkeypatch.setattr(limit, "max_position_embeddings", 100)
    with packed.running(True), torch.no_grad():
        found = Crosscheck(length=24, windows=1).run(farm.session, lambda done, total: None)
    assert "cache_difference" not in {metric.metric for metric in found.metrics}
    assert farm.session.notes[-1].endswith("the packed KV cache is not compared: 151 tokens of at most 100")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_crosscheck_sees_words_that_are_read_wrong(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    farm, packed = ready(tmp_path, tiny_models, monkeypatch)
    check = Crosscheck(length=24, windows=1)
    with packed.running(True), torch.no_grad():
        check.run(farm.session, lambda done, total: None)
    real = ops.kv_outputs
    monkeypatch.setattr(
        ops, "kv_outputs", lambda w, v: real(w, dataclasses.replace(v, minimum=v.minimum.roll(1, dims=1)))
    )
    with (
        packed.running(True),
        torch.no_grad(),
        pytest.raises(Disagreement, match="attention over packed keys and values differs by"),
    ):
        check.run(farm.session, lambda done, total: None)


def test_what_kernels_cannot_read_is_read_dequantized_and_said(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    given = {"methods": f"[{KIVI}]", "bits": "[kv4]", "group_sizes": "[-1]"}
    _, packed = packed_model(tmp_path, tiny_models["qwen3"], **given)
    assert packed.attention is None
    assert packed.notes()[-1] == "packed: KV cache: read dequantized: the kernels are for GPUs"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": "float32"}, "kernels compute in float16, the model in float32"),
        ({"bits": "[kv3]"}, "3-bit keys: attention's kernels read 2 and 4 bits"),
        ({"methods": "[kivi: {{group: 16, residual: 16}}]"}, "groups of 16: attention's kernels read those of 32"),
        ({"methods": "[rtn]"}, "RTNLayer stores codes in no layout that attention's kernels read"),
    ],
)
def test_rules_of_what_kernels_read(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], rule: str
) -> None:
    _, packed = ready(tmp_path, tiny_models, monkeypatch, **changes)
    assert packed.attention is None and rule in packed.notes()[-1]


def test_what_attention_does_not_know_is_refused() -> None:
    layer = KIVILayer(4, 4, group=32, residual=32)
    layer.in_words = True
    layer.update(noise(40), noise(40, 1))
    layer.words_wanted = True
    keys, values = layer.update(noise(1), noise(1, 1))
    module = torch.nn.Module()
    setattr(module, packed_attention.READING, packed_attention.Reading("sdpa", layer))
    with pytest.raises(ModelError, match="asks for softcap, which attention over packed keys does not know"):
        packed_attention.attention(module, noise(1), keys, values, None, softcap=50.0)
