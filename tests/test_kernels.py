"""Kernels against their references: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernel_cases import CASES, answer

ROOT = Path(__file__).parents[1]


class Interpreter:
    """A process that runs cases in Triton's interpreter; a crash costs the case that crashed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, name: str) -> str:
        """A case's traceback, empty where it passed."""
        if self.process is None or self.process.poll() is not None:
            environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kernel_cases"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else f"the interpreter died with exit code {self.process.wait()}"

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    process = Interpreter()
    yield process
    process.close()


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, interpreter: Interpreter) -> None:
    failure = interpreter.run(name)
    assert not failure, failure


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the same cases ran in Triton's interpreter")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gpu])
def test_on_a_gpu(name: str) -> None:
    failure = answer(name, "cuda")
    assert not failure, failure
