"""Layer benchmark of slim_conv2d_norm: convolution and batch norm, computed twice, against the layers one by one."""

from . import pairs

UNIT = "GFLOP/s"
eager, ours, work = pairs.eager, pairs.ours, pairs.convolution_work


def test_slim_conv2d_norm(benchmark, layer_benchmark, stage, provider):
    layer_benchmark(benchmark, stage, provider)
