"""As test_properties.py, of the Triton kernels in Triton's interpreter: tens of small calls, a hundredth of --cases."""

import pytest
from support.property_runner import run
from support.property_triton import check_triton, triton_cases
from support.property_worker import Worker

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(
    ("operator", "budget"), [("slim_conv2d", 1500), ("slim_norm_conv2d", 800)], ids=["slim_conv2d", "slim_norm_conv2d"]
)
def test_operator(request, operator, budget):
    worker = Worker(check_triton, {"TRITON_INTERPRET": "1"})
    run(request, triton_cases((operator,), budget), request.config.getoption("--cases") // 100, worker)
    worker.close()
