"""Chat: the template's tokens, greedy text as it is streamed, cells from stores and jobs, and what is refused."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from qfarm.chat import SYSTEM, answer, open_cell, opening, prompt_ids, stored_cell
from qfarm.cli import main
from qfarm.console import Chat
from qfarm.errors import InvalidInput
from qfarm.layers.cache import RTNLayer
from qfarm.worker import Session
from tests.conftest import save_tiny, speaking
from tests.test_worker import Farm, make_job

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
JOB = """
models: [{model}]
methods: [rtn]
bits: [w8, kv4]
dtype: float32
evaluate: [perplexity: {{text: python-docs, length: 32, windows: 2}}]
resources: {{gpus: 0}}
"""
SAID = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    return speaking(save_tiny(tmp_path_factory.mktemp("talker"), "llama"), TEMPLATE)


@pytest.fixture
def farm(tmp_path: Path, talker: Path) -> Farm:
    return Farm(tmp_path / "store", make_job(talker, JOB))


@pytest.fixture
def session(farm: Farm) -> Session:
    cell = next(planned.cell for planned in farm.plan().cells if planned.cell.scheme == "kv4")
    return open_cell(cell, None, lambda *event: None)


class Tokenizer:
    """A word is its characters; BOS is 1."""

    bos_token_id: int | None = 1

    def __init__(self, writes: int, adds: bool) -> None:
        self.writes, self.adds = writes, adds

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "\x01" * self.writes + "ab"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * (self.adds and add_special_tokens) + [ord(c) for c in text]


@pytest.mark.parametrize(
    ("writes", "adds", "begins"), [(1, True, 1), (1, False, 1), (0, True, 1), (0, False, 0), (2, True, 1)]
)
def test_there_is_one_bos_if_the_template_or_the_tokenizer_wants_it(writes: int, adds: bool, begins: int) -> None:
    assert prompt_ids(Tokenizer(writes, adds), SAID) == [1] * begins + [97, 98]


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = Tokenizer(0, False)
    tokenizer.bos_token_id = None
    assert prompt_ids(tokenizer, SAID) == [97, 98]


def test_a_template_without_system_messages_gets_none(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    job, prompts = tmp_path / "job.yaml", tmp_path / "prompts.txt"
    job.write_text(JOB.format(model=speaking(save_tiny(tmp_path / "strict", "llama"), strict)))
    prompts.write_text("Hello\nWho are you?\n")
    heard: list[Any] = []

    def reply(session: Session, messages: Any, new_tokens: int) -> Any:
        heard.append(list(messages))
        yield "fine"

    monkeypatch.setattr("qfarm.chat.answer", reply)
    assert run("chat", "baseline w16", "--job", str(job), "--prompts", str(prompts)) == 0
    assert heard == [[{"role": "user", "content": text}] for text in ("Hello", "Who are you?")]
    assert "the chat template takes no system message; it is left out" in capsys.readouterr().err


def test_an_answer_is_what_generate_gives_with_the_quantized_cache(session: Session) -> None:
    model = session.loaded
    ids = prompt_ids(model.tokenizer, SAID)
    assert ids[0] == 256 and 256 not in ids[1:] and opening(model.tokenizer) == SAID[:1]
    with torch.no_grad(), model.reading_cache("full"):
        options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
        made = model.model.generate(torch.tensor([ids]), **options)
    layers = (made.get("cache") or made.get("past_key_values")).layers
    assert all(isinstance(layer, RTNLayer) for layer in layers)
    expected = model.tokenizer.decode(made.sequences[0, len(ids) :], skip_special_tokens=True)
    pieces = list(answer(session, SAID, 12))
    assert expected.startswith("".join(pieces)) and len(pieces) > 1
    assert expected.removeprefix("".join(pieces)).strip("�") == ""  # an unfinished character is not shown


def test_an_answer_ends_at_the_end_token_and_at_the_limit(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(loaded: Any, ids: Any) -> Any:
        yield from (torch.tensor([[token]]) for token in (72, 71, 257, 70))

    monkeypatch.setattr("qfarm.chat.greedy_steps", steps)
    text = session.loaded.tokenizer.decode([72, 71])
    assert "".join(answer(session, SAID, 9)) == text and "".join(answer(session, SAID, 1)) == text[0]


def test_a_conversation_that_is_too_long_is_refused(session: Session) -> None:
    with pytest.raises(InvalidInput, match="tokens of conversation and 250 new ones: .* reads at most 256$"):
        list(answer(session, SAID, 250))


def test_a_model_without_a_template_is_refused(tmp_path: Path, tiny: Path) -> None:
    cell = Farm(tmp_path / "store", make_job(tiny, JOB)).plan().cells[0].cell
    with pytest.raises(InvalidInput, match="has no chat template$"):
        open_cell(cell, None, lambda *event: None)


def test_a_stored_cell_is_the_planned_one(farm: Farm) -> None:
    planned = farm.plan().cells
    index = next(i for i, each in enumerate(planned) if each.cell.scheme == "kv4")
    assert farm.run(index).failure is None
    assert stored_cell(farm.store, "rtn kv4") == planned[index].cell
    with pytest.raises(InvalidInput, match='^"rtn kv3" names no cell of this store, did you mean "rtn kv4"[?] cells: '):
        stored_cell(farm.store, "rtn kv3")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    return int(str(done.value.code))


def test_the_command_answers_a_file_of_prompts(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, prompts = tmp_path / "job.yaml", tmp_path / "prompts.txt"
    job.write_text(JOB.format(model=talker))
    prompts.write_text("Hello\n\nWho are you?\nHello\n")
    assert run("chat", "rtn kv4", "--job", str(job), "--prompts", str(prompts), "--new-tokens", "8") == 0
    out = capsys.readouterr().out.split("> ")
    assert [part.split("\n")[0] for part in out[1:]] == ["Hello", "Who are you?", "Hello"]
    assert out[1].strip() == out[3].strip() != "Hello", "each prompt is a conversation of its own"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for arguments, line in [
        (("rtn kv4", "--job", str(job), "--prompts", str(empty)), "empty.txt: holds no prompt; write one per line"),
        (("rtn kv4", "--job", str(job), "--prompts", "none.txt"), "none.txt: cannot be read: No such file"),
        (("gptq", "--job", str(job)), '"gptq" names no cell of this job'),
        (("rtn", "--job", str(job), "--store", "s"), "--store and --job exclude each other"),
    ]:
        assert run("chat", *arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and line in said[0]


def test_a_conversation_remembers_what_was_said(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(model=talker))
    heard: list[list[str]] = []

    def reply(session: Session, messages: Any, new_tokens: int) -> Any:
        heard.append([message["content"] for message in messages])
        yield from ("\x1b[31mfi", "ne\n")

    monkeypatch.setattr("qfarm.chat.answer", reply)
    monkeypatch.setattr(sys, "stdin", StringIO("How are you?\nReally?\nexit\nnever read\n"))
    assert run("chat", "baseline w16", "--job", str(job)) == 0
    assert [words[1:] for words in heard] == [["How are you?"], ["How are you?", "\x1b[31mfine\n", "Really?"]]
    shown = capsys.readouterr()
    assert "fine" in shown.out and "\x1b" not in shown.out and "an empty line or `exit` ends" in shown.err


def test_input_that_ends_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("one\n"))
    assert list(Chat().questions("cell")) == ["one"]
