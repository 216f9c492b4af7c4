"""Fixtures that every test may use. Builders of tiny models are in `tiny.py`: `from tiny import tiny_config`."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings


# The same examples each time, and however busy the machine is.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
SHARED = TESTS.parent.parent / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Data computed by the original code (see golden/README.md)."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared() -> Path:
    """Pictures and benchmark files that are not part of the project; the test is skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared data is not at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
