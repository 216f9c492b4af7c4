"""Tests that need a CUDA GPU (`make test-gpu`); without one each is skipped with that reason. They take under eight minutes."""

import pytest
import torch
from training.conftest import base_model, instructions, settings  # noqa: F401  (fixtures)


HAS_BF16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason="no bfloat16"))]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; run by `make test-gpu`")


def pytest_collection_modifyitems(config, items):
    reason = "run by `make test-gpu`" if "gpu" not in config.option.markexpr else None
    reason = reason if torch.cuda.is_available() else "torch finds no CUDA GPU"
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def empty_cache():
    """The memory of one test does not count in the next; a cap that a test sets ends with it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
