"""Fixtures for all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make the inputs of every test the same in every run."""
    torch.manual_seed(0)
