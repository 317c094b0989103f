"""Every test starts from the same random state."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_random_state() -> None:
    torch.manual_seed(0)
