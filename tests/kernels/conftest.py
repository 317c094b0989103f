"""Every test starts from the same random state; some run with every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from paceline_kernels.cpu import library


@pytest.fixture(autouse=True)
def fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512", "amx"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use each instruction set of the C++ kernels that this machine has."""
    loaded = library.library()
    assert loaded is not None
    before = loaded.pl_isa()
    if loaded.pl_use_isa(request.param.encode()):
        assert request.param != "portable"
        pytest.skip("this machine cannot run it")
    yield
    loaded.pl_use_isa(before)
