"""Shared fixtures: one thread, fixed seeds, derandomised property tests, a fresh compiler."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # two workers on two cores; also makes sums reproducible
settings.register_profile("jdfunc", derandomize=True, deadline=None, database=None)
settings.load_profile("jdfunc")


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` skip themselves on a machine without an accelerator."""
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same global generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    """Compiled code and its guards do not leak from one test into the next."""
    yield
    if request.node.get_closest_marker("compile"):
        torch.compiler.reset()


@pytest.fixture
def device() -> torch.device:
    """Where tests put their tensors: `JDFUNC_DEVICE`, by default the CPU."""
    return torch.device(os.environ.get("JDFUNC_DEVICE", "cpu"))
