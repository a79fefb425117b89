"""Random calls of every operator over its whole contract, against float64: support/property_cases.py draws them.

`--cases` is the number over all operators together; the same calls every time, unless `--hypothesis-seed` names
others. A failure prints the smallest call that fails as a command, also where it ends the process.
"""

import math
from collections import Counter

import pytest
from support.property_cases import batch_norm_cases, conv_cases, linear_cases, pool_cases
from support.property_checks import check
from support.property_invalid import check_refused, invalid_calls
from support.property_runner import run
from support.property_worker import Worker

STRATEGIES = {  # and the share of the cases
    "slim_conv2d": (conv_cases(), 8),
    "slim_conv2d_statistics": (conv_cases(("slim_conv2d_statistics",)), 1),
    "slim_norm_conv2d": (conv_cases(("slim_norm_conv2d",)), 2),
    "slim_conv2d_norm": (conv_cases(("slim_conv2d_norm",)), 2),
    "slim_linear": (linear_cases(), 2),
    "slim_batch_norm": (batch_norm_cases(), 2),
    "slim_norm_max_pool2d": (pool_cases(), 2),
    "invalid arguments": (invalid_calls(), 1),
}


@pytest.fixture(scope="module")
def worker():
    worker = Worker(check)
    yield worker
    worker.close()


@pytest.mark.parametrize("operator", STRATEGIES)
def test_operator(request, operator, worker):
    strategy, share = STRATEGIES[operator]
    cases = math.ceil(request.config.getoption("--cases") * share / sum(share for _, share in STRATEGIES.values()))
    if operator == "invalid arguments":
        worker = Worker(check_refused)
    run(request, strategy, cases, worker)


def test_every_residue_comes_up(request):
    """Of the padding by the stride and by the dilation, and of the kernel by the stride, 1 in 100 cases at least."""
    found = Counter()

    def count(case):
        for axis in (0, 1):
            kernel, stride, padding, dilation = (
                of[axis] for of in (case.kernel, case.stride, case.padding, case.dilation)
            )
            found["padding", stride, padding % stride] += 1
            if kernel > 1:
                found["kernel", stride, kernel % stride] += 1
                found["dilation", dilation, padding % dilation] += 1

    run(request, conv_cases(), 1000, count)
    for kind in ("padding", "dilation", "kernel"):
        for modulus in (1, 2, 3, 4):
            counts = [found[kind, modulus, residue] for residue in range(modulus)]
            assert min(counts) >= 10, f"{kind} modulo {modulus}: {counts}"


def test_a_crash_is_reported(worker):
    """And the next case is checked by another process."""
    from support.property_cases import LinearCase
    from support.property_worker import Crash

    dying = Worker(die)
    with pytest.raises(Crash, match=r"(?s)died of SIGSEGV.*tests python -c .*LinearCase"):
        dying(LinearCase())
    with pytest.raises(Crash, match="died of SIGSEGV"):
        dying(LinearCase())
    assert worker(LinearCase()) == "computed"


def die(case) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSEGV)
