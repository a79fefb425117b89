"""torch.utils.flop_counter: each operator counts what PyTorch's own does for a dense network of the slice's size."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gradaug_kernels as gk

NHWC = torch.channels_last


def count(function, *tensors):
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        y.sum().backward()
    return counter.get_total_flops()


def leaves(*shapes, takes=None):
    takes = range(len(shapes)) if takes is None else takes
    return [torch.randn(shape).requires_grad_(i in takes) for i, shape in enumerate(shapes)]


GEOMETRIES = {  # x, full weight, out_channels, geometry
    "dense": ((2, 5, 7, 6), (9, 8, 3, 3), 6, {"padding": 1}),
    "strided": ((2, 5, 9, 8), (9, 8, 3, 2), 9, {"stride": 2, "padding": (1, 0)}),
    "dilated": ((1, 5, 9, 8), (9, 8, 3, 3), 7, {"dilation": (1, 2)}),
    "1x1": ((3, 5, 4, 4), (9, 8, 1, 1), 6, {}),
    "grouped": ((2, 6, 7, 6), (9, 3, 3, 3), 6, {"groups": 3}),
    "depthwise": ((2, 6, 7, 6), (9, 1, 3, 3), 6, {"groups": 6, "padding": 1}),
}
OPERATORS = {
    "slim_conv2d": lambda x, w, out, geometry: gk.slim_conv2d(x, w, None, out, **geometry),
    "slim_conv2d_statistics": lambda x, w, out, geometry: gk.slim_conv2d_statistics(x, w, None, out, **geometry)[0],
    "slim_norm_conv2d": lambda x, w, out, geometry: gk.slim_norm_conv2d(x, w, None, out, relu=True, **geometry)[0],
    "slim_conv2d_norm": lambda x, w, out, geometry: gk.slim_conv2d_norm(x, w, None, out, **geometry)[0],
}


@pytest.mark.parametrize("takes", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("buffer", [False, True])
def test_convolutions(operator, geometry, takes, buffer):
    size, full, out, options = GEOMETRIES[geometry]
    x, weight = leaves(size, full, takes=takes)
    groups = options.get("groups", 1)
    dense = leaves(size, (out, size[1] // groups, *full[2:]), takes=takes)
    expected = count(lambda x, w: F.conv2d(x, w, **options), *dense)
    if operator == "slim_conv2d_norm":  # the backward pass computes the convolution again
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            F.conv2d(*dense, **options)
        expected += counter.get_total_flops()
    if buffer:
        options = {**options, "weight_grad": torch.zeros(full)}
    assert count(lambda x, w: OPERATORS[operator](x, w, out, options), x, weight) == expected > 0


@pytest.mark.parametrize("takes", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("rows", [(4,), (2, 3)])
@pytest.mark.parametrize("buffer", [False, True])
def test_linear_layers(rows, takes, buffer):
    x, weight = leaves((*rows, 5), (9, 8), takes=takes)
    dense = leaves((*rows, 5), (6, 5), takes=takes)
    weight_grad = torch.zeros(9, 8) if buffer else None
    found = count(lambda x, w: gk.slim_linear(x, w, None, 6, weight_grad), x, weight)
    assert found == count(F.linear, *dense) > 0


def test_norms_and_pooling_count_nothing():
    (x,) = leaves((2, 3, 6, 6))
    assert count(lambda x: gk.slim_batch_norm(x)[0], x) == 0
    assert count(lambda x: gk.slim_norm_max_pool2d(x, 2)[0], x) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"fuse_chains": False}),
        ("resnet18", {"recompute": True}),
        ("mobilenet_v2", {}),
        ("mobilenet_v2", {"fuse_chains": False}),
    ],
)
def test_a_model_counts_what_the_original_counts(name, options):
    with torch.device("meta"):  # counts need shapes only
        network, images = getattr(torchvision.models, name)(), torch.randn(2, 3, 64, 64)
    expected = count(network, images)
    assert count(gk.convert(copy.deepcopy(network), **options), images) == pytest.approx(expected, rel=0.01)


def plain_network(width):
    c = [round(width * channels) for channels in (16, 24)]
    layers = [nn.Conv2d(3, c[0], 3), nn.BatchNorm2d(c[0]), nn.ReLU()]
    layers += [nn.Conv2d(c[0], c[0], 3, groups=c[0], bias=False), nn.BatchNorm2d(c[0]), nn.ReLU()]
    layers += [nn.Conv2d(c[0], c[1], 1, bias=False), nn.BatchNorm2d(c[1])]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c[1], 5))


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_sub_network_counts_what_a_dense_one_counts(accumulate):
    model = gk.convert(plain_network(1.0))
    accumulation = gk.AccumulateIntoGrad(model)
    if accumulate:
        accumulation.begin_step()
    for width in (1.0, 0.5):
        with gk.use_width(model, width), accumulation:
            assert count(model, torch.randn(2, 3, 9, 9)) == count(plain_network(width), torch.randn(2, 3, 9, 9))


def test_a_recomputing_model_counts_its_recomputation_where_it_recomputes():
    """What is executed, as checkpointing counts it. The counter hooks modules, whose layers then run one by one."""
    images = torch.randn(2, 3, 9, 9)
    model, recomputing = gk.convert(plain_network(1.0)), gk.convert(plain_network(1.0), recompute=True)
    assert count(recomputing, images) == count(model, images)
    again = 2 * 2 * 5 * 5 * 16 * 24  # the convolution before the last norm: N, OH, OW, channels
    for network, expected in ((model, count(model, images)), (recomputing, count(model, images) + again)):
        with FlopCounterMode(display=False) as counter:
            counter.mod_tracker.__exit__()
            network(images).sum().backward()
            counter.mod_tracker.__enter__()
        assert counter.get_total_flops() == expected


def test_compositions_count_as_pytorch_does():
    x, weight = leaves((2, 5, 7, 6), (9, 8, 3, 3))
    found = []
    for function, w in ((lambda x, w: gk.slim_conv2d(x, w, None, 6), weight), (F.conv2d, weight[:6, :5])):
        with FlopCounterMode(display=False) as counter:
            torch.func.grad(lambda x, f=function, w=w: f(x, w).sum())(x)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0
