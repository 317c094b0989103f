"""Every test starts from the same random state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.trainer.tiny_target import tiny_target


@pytest.fixture(autouse=True)
def fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target of a few hundred tokens."""
    return tiny_target(tmp_path_factory.mktemp("target"))
