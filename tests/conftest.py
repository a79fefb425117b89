"""Every test runs with two threads and with uninitialised memory filled with NaN."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=2000, help="calls that the property tests draw, all together")


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """`torch.empty` returns NaN (the largest value for integers): a kernel that reads what nobody wrote is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def two_threads():
    """Whatever an earlier test set: PyTorch's own errors, which ours are judged by, depend on it."""
    torch.set_num_threads(2)
