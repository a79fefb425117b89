"""Layer benchmark of slim_norm_max_pool2d: batch norm, ReLU and max pooling, against the layers one by one."""

from . import pairs

UNIT = "GB/s"
eager, ours, work = pairs.eager, pairs.ours, pairs.pooling_work


def test_slim_norm_max_pool2d(benchmark, layer_benchmark, stage, provider):
    layer_benchmark(benchmark, stage, provider)
