"""Mapped weights: pages of files, the same numbers as transformers' own conversion, one conversion per machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qfarm import cache
from qfarm.models import mapped
from qfarm.models.load import LoadedModel
from qfarm.models.mapped import CONVERTED, checkpoint_files, in_dtype
from qfarm.models.reference import resolve
from tests.conftest import TINY, save_tiny
from tests.test_models import loaded


@pytest.fixture
def converting(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a model is, its files are converted, and in several shards."""
    monkeypatch.setattr(mapped, "SMALL_BYTES", 0)
    monkeypatch.setattr(mapped, "SHARD_BYTES", 40_000)


def mappings() -> dict[tuple[int, int], tuple[str, dict[str, int]]]:
    """This process's mappings: (start, stop) -> file, sizes in KiB by kind."""
    found: dict[tuple[int, int], tuple[str, dict[str, int]]] = {}
    sizes: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            sizes = {}
            found[start, stop] = (rest[4] if len(rest) > 4 else "", sizes)
        elif rest[-1:] == ["kB"]:
            sizes[first[:-1]] = int(rest[0])
    return found


def file_of(model: LoadedModel) -> dict[str, tuple[str, dict[str, int]]]:
    """The mapping in which each parameter lies."""
    known = mappings()
    return {
        name: next(value for (start, stop), value in known.items() if start <= parameter.data_ptr() < stop)
        for name, parameter in model.model.named_parameters()
    }


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) and x.dtype == y.dtype for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_converted_files_hold_what_transformers_would_convert(
    tiny_models: dict[str, Path], family: str, dtype: str, converting: None
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=getattr(torch, dtype)).eval()
    model = loaded(tiny_models[family], dtype)
    assert same(model.model, plain)
    assert model.model.generation_config.to_dict() == plain.generation_config.to_dict()
    ids = torch.arange(40)[None]
    assert torch.equal(model.model(ids).logits, plain(ids).logits)


def test_weights_are_pages_of_the_checkpoint(tiny: Path) -> None:
    model = loaded(tiny)
    assert {Path(file) for file, _ in file_of(model).values()} == {tiny / "model.safetensors"}


def test_weights_in_another_dtype_are_pages_of_one_converted_copy(tiny: Path, converting: None) -> None:
    model = loaded(tiny, "bfloat16")
    files = {Path(file) for file, _ in file_of(model).values()}
    (folder,) = (path for path in (cache.root() / CONVERTED).iterdir() if path.is_dir())
    assert {file.parent for file in files} == {folder} and len(files) > 1
    again = loaded(tiny, "bfloat16")
    assert {Path(file) for file, _ in file_of(again).values()} == files


def test_reading_and_replacing_weights_copies_no_page(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", hidden_size=256, intermediate_size=1024)
    model = loaded(folder)
    model.body(torch.arange(40)[None])
    linear = model.linears(0)["up"]
    model.replace_weight(linear, torch.zeros_like(linear.weight))
    model.restore()
    assert all(file == str(folder / "model.safetensors") for file, _ in file_of(model).values())
    copied = [sizes["Anonymous"] for _, sizes in file_of(model).values()]
    assert copied == [0] * len(copied), "a page that was written to is a copy of this process's own"


def test_small_models_and_files_in_the_dtype_are_loaded_as_they_lie(tiny: Path, converting: None) -> None:
    facts = resolve(str(tiny))
    assert in_dtype(facts, torch.float32) == (facts.location, None, None)
    mapped.SMALL_BYTES = 1 << 20  # undone by the fixture's monkeypatch
    assert in_dtype(facts, torch.bfloat16) == (facts.location, None, None)
    assert not (cache.root() / CONVERTED).exists()


def test_a_full_disk_is_said_and_every_worker_converts_for_itself(
    tiny: Path, converting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    model = loaded(tiny, "bfloat16")
    assert model.not_shared is not None and "not shared" in model.not_shared
    assert str(cache.root()) in model.not_shared
    assert not (cache.root() / CONVERTED).exists()


def test_the_files_of_an_index_are_found(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "whole", "llama"))
    folder = tmp_path / "sharded"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    found = checkpoint_files(resolve(str(folder)))
    assert len(found) > 1 and sorted(found) == sorted(folder.glob("*.safetensors"))
