"""The Triton kernels compile for CUDA, and give the matrix units the same work for any batch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

SMALL_GPU_SHARED_BYTES = 99 << 10
"""Shared memory of a program on compute capability 8.6, 8.9 and 12.0."""


def run_python(*args: str, **env: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_leaves_triton_alone() -> None:
    loaded = run_python("-c", "import sys, paceline_kernels; print('triton' in sys.modules)")
    assert loaded.strip() == "False"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All operations as compiled for Hopper."""
    cache = str(tmp_path_factory.mktemp("triton"))
    lines = run_python("-m", "tests.kernels.triton_compile", "90", TRITON_CACHE_DIR=cache)
    return [json.loads(line) for line in lines.splitlines()]


def instructions(compiled: list[dict[str, Any]], operation: str) -> set[str]:
    """Return the matrix instructions of an operation."""
    found = [line["instructions"] for line in compiled if line["operation"] == operation]
    assert found, operation
    return {name for names in found for name in names}


@pytest.mark.parametrize(
    ("kind", "batches"),
    [
        ("linear bf16", (1, 32, 300)),
        ("gated bf16", (1, 300)),
        ("linear int8", (1, 300)),
    ],
)
def test_rows_change_only_the_columns_of_an_instruction(
    compiled: list[dict[str, Any]], kind: str, batches: tuple[int, ...]
) -> None:
    """Each sum is one output by one row over the instruction's depth: m64, k16 or k32."""
    shapes = {
        re.sub(r"(m64)n\d+", r"\1", name)
        for rows in batches
        for name in instructions(compiled, f"{kind} {rows}")
    }
    assert len(shapes) == 1
    assert "m64k" in shapes.pop()


def test_decode_prefill_and_trees_attend_with_the_same_instructions(
    compiled: list[dict[str, Any]],
) -> None:
    decode = instructions(compiled, "attention bf16 decode")
    assert len(decode) == 2
    assert instructions(compiled, "attention bf16 prefill") == decode
    assert instructions(compiled, "attention bf16 tree") == decode


def test_float32_is_multiplied_as_such(compiled: list[dict[str, Any]]) -> None:
    """Matrix units would round its factors to TF32."""
    assert not instructions(compiled, "linear f32 1")
    assert not instructions(compiled, "attention f32 decode")


def test_every_kernel_fits_small_gpus(compiled: list[dict[str, Any]]) -> None:
    assert max(line["shared_bytes"] for line in compiled) <= SMALL_GPU_SHARED_BYTES
