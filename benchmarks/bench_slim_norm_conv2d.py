"""Layer benchmark of slim_norm_conv2d: batch norm, ReLU and convolution, against the layers one by one."""

from . import pairs

UNIT = "GFLOP/s"
eager, ours, work = pairs.eager, pairs.ours, pairs.convolution_work


def test_slim_norm_conv2d(benchmark, layer_benchmark, stage, provider):
    layer_benchmark(benchmark, stage, provider)
