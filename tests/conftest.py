"""Shared fixtures: a tiny model of each family on disk, isolated caches, the optional data pack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qfarm.models.load import LoadedModel

# Before torch is imported: spinning threads make small operators on a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PACK = Path(os.environ.get("QFARM_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 256},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache, and none inherits a data pack or a cluster by accident."""
    monkeypatch.setenv("QFARM_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("QFARM_DATA", "QFARM_STORE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def pack() -> str:
    """The data pack's folder; tests that need it are skipped where it is not there."""
    if not (PACK / "pack.yaml").is_file():
        pytest.skip(f"no data pack at {PACK} (set QFARM_DATA)")
    return str(PACK)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No model and no data set of the hub can be had, whatever this machine has cached."""
    import datasets
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(datasets, "load_dataset", refuse)


def save_tiny(folder: Path, family: str, **changes: Any) -> Path:
    """A random model with two blocks and a byte-like tokenizer, saved as a checkpoint."""
    from qfarm.bench.random_model import save_random

    return save_random(folder, family, **{**TINY[family], **changes})


def speaking(folder: Path, template: str | None = None) -> Path:
    """The same checkpoint with a tokenizer that decodes to plain text, and a chat template where one is given."""
    from tokenizers import decoders
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny checkpoints by family."""
    return {family: save_tiny(tmp_path_factory.mktemp(family), family) for family in TINY}


@pytest.fixture(scope="session")
def tiny(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path]) -> dict[str, LoadedModel]:
    """The tiny models by family, loaded once for a file of tests."""
    from tests.test_models import loaded

    return {family: loaded(path) for family, path in tiny_models.items()}


@pytest.fixture
def model(models: dict[str, LoadedModel], family: str) -> Iterator[LoadedModel]:
    """One family's model, restored behind each test."""
    yield models[family]
    models[family].restore()
