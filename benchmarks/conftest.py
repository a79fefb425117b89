"""`pytest benchmarks --benchmark-only`: the cases and options of `python -m benchmarks` under pytest-benchmark."""

import pytest
import torch

from gradaug_kernels.recipes.memory import keep_freed_blocks

from .cases import DTYPES, distinct_layers, network
from .layers import BENCHES, gate_layer, make_layer_run
from .memory import peak_bytes
from .options import add_options
from .timing import synchronize

OPTIONS = ("model", "batch", "size", "dtype", "widths", "providers", "threads")


def pytest_addoption(parser):
    add_options(parser.getgroup("benchmarks of gradaug_kernels").addoption, OPTIONS)


def pytest_configure(config):
    torch.set_num_threads(config.getoption("threads"))
    keep_freed_blocks()


def pytest_generate_tests(metafunc):
    options = {name: metafunc.config.getoption(name) for name in OPTIONS}
    networks = [network(name, options["batch"], options["size"]) for name in options["model"]]
    if "net" in metafunc.fixturenames:
        metafunc.parametrize("net", networks, ids=lambda net: net.name)
    if "width" in metafunc.fixturenames:
        metafunc.parametrize("width", options["widths"], ids="w{:g}".format)
    if "layer_case" in metafunc.fixturenames:
        op = metafunc.function.__name__.removeprefix("test_")
        cases = [
            pytest.param(case, id=f"{net.name}-{case[0]}")
            for net in networks
            for width in options["widths"]
            for case in distinct_layers(net, width).items()
            if case[0].op == op
        ]
        metafunc.parametrize("layer_case", cases)
        metafunc.parametrize("stage", ["forward", "backward"])
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", options["providers"])


@pytest.fixture
def dtype(request):
    return request.config.getoption("dtype")


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def layer_benchmark(layer_case, dtype, device):
    """Times one stage of one layer behind its gate."""

    def run(benchmark, stage, provider):
        layer, layer8 = layer_case
        state = BENCHES[layer.op].eager(layer).state_dict()
        timed = make_layer_run(provider, layer, layer8, DTYPES[dtype], device, state)
        if provider == "ours":
            gate = gate_layer(layer, DTYPES[dtype], device, timed, state)
            assert gate.green, gate

        def setup():
            timed.prepare()
            if stage == "backward":
                timed.forward()
            synchronize(device)

        def sample():
            timed.workload.stages[stage]()
            synchronize(device)

        benchmark.pedantic(sample, setup=setup, rounds=20, warmup_rounds=2)
        benchmark.extra_info.update(layer=str(layer), peak_mb=peak_bytes(timed.workload.run, device) / 1e6)

    return run
