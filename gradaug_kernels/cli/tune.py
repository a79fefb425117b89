"""`gradaug tune`: measure which path is fastest for each bucket of convolutions on this card, and keep the table.

The convolutions are those of real networks at several widths, forward and both gradients. For each `bucket`
(_gpu/paths.py) every path that can do it runs on the first convolution met, interleaved, after its result has been
compared with cuDNN's; the fastest is kept. GRADAUG_CUDA=auto, the default, reads the table when the package first
meets the card.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .._gpu.paths import DIRECTIONS, TUNING, Geometry, bucket, candidates, card_name, card_of, paths_built
from .._torchvision import torchvision_module
from ..models.wide_resnet import wide_resnet
from ..slim.convert import convert
from ..slim.width import use_width

NETWORKS = ("resnet50", "wrn-28-10", "resnext50", "mobilenet-v3-large")
WIDTHS = (1.0, 0.97, 0.93, 0.9, 0.8)


def build_network(name: str) -> tuple[nn.Module, int]:
    """A network of NETWORKS, converted, its convolutions one by one, and the image size it is made for."""

    published = torchvision_module("models")
    builders = {
        "resnet50": (published.resnet50, 224),
        "wrn-28-10": (lambda: wide_resnet(100), 32),
        "resnext50": (published.resnext50_32x4d, 224),
        "mobilenet-v3-large": (published.mobilenet_v3_large, 224),
    }
    build, size = builders[name]
    return convert(build(), fuse_chains=False), size


def convolutions(model: nn.Module, size: int, batch: int, width: float, dtype: torch.dtype) -> list[Geometry]:
    """The distinct convolutions of a converted network at a width, forward. Nothing is computed."""

    found: dict[Geometry, None] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.gradaug.slim_conv2d.default:
                x, weight, _, out_channels, *geometry, groups = args
                options = (*(tuple(pair) for pair in geometry), groups)
                full_o, full_c, kh, kw = weight.shape
                found[Geometry("forward", dtype, *x.shape, out_channels, full_c, full_o, kh, kw, *options)] = None
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), use_width(model, width), FakeTensorMode(allow_non_fake_inputs=True), Recorder():
        model(torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last))
    return list(found)


def layers(
    networks: Iterable[str], widths: Iterable[float], batch: int, dtypes: Iterable[torch.dtype]
) -> Iterator[Geometry]:
    """Every convolution of the networks at the widths, in every direction; an image has no gradient."""
    found: list[Geometry] = []
    for network in networks:
        model, size = build_network(network)
        for width in widths:
            for dtype in dtypes:
                found += convolutions(model, size, batch, width, dtype)
    for forward in dict.fromkeys(found):
        for direction in DIRECTIONS:
            if direction != "input_grad" or forward.c != 3:
                yield forward._replace(direction=direction)


def operands(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, full-width weight and dy of a convolution, NHWC and OHWI."""
    g = geometry
    make = {"dtype": g.dtype, "device": device}
    x = torch.randn(g.n, g.c, g.h, g.w, **make).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(g.full_o, g.full_c, g.kh, g.kw, **make).contiguous(memory_format=torch.channels_last)
    weight *= (g.c // g.groups * g.kh * g.kw) ** -0.5
    arguments = (x, weight, None, g.o, g.stride, g.padding, g.dilation, g.groups)
    y = paths_built()["cudnn"]["forward"](*arguments)
    return x, weight, torch.randn_like(y)


def call(path: str, geometry: Geometry, x: Tensor, weight: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """A function that runs one path and returns its result; weight gradients are added to one float32 buffer."""
    kernel, options = paths_built()[path][geometry.direction], geometry[-4:]
    if geometry.direction == "forward":
        return lambda: kernel(x, weight, None, geometry.o, *options)
    if geometry.direction == "input_grad":
        return lambda: kernel(dy, weight, x.shape, *options)
    buffer = torch.zeros_like(weight, dtype=torch.float32)

    def weight_grad():
        kernel(dy, x, buffer, *options)
        return buffer

    return weight_grad


def measure(geometry: Geometry, device: torch.device, repetitions: int = 15) -> dict[str, float]:
    """Median microseconds of every path whose first result agrees with cuDNN's.

    Agreeing is an error against exact float64 sums of at most twice cuDNN's, as in the tests.
    """
    tensors = operands(geometry, device)
    exact = call("cudnn", geometry._replace(dtype=torch.float64), *(t.double() for t in tensors))().double()
    calls = {path: call(path, geometry, *tensors) for path in candidates(geometry, card_of(device))}
    errors = {path: float((run().double() - exact).abs().max()) for path, run in calls.items()}
    spare = torch.finfo(geometry.dtype).eps * float(exact.abs().max())
    calls = {path: run for path, run in calls.items() if errors[path] <= 2 * errors["cudnn"] + spare}

    times: dict[str, list[float]] = {path: [] for path in calls}
    for _ in range(repetitions):
        for path, run in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            run()
            end.record()
            end.synchronize()
            times[path].append(start.elapsed_time(end) * 500)  # milliseconds of two calls
    return {path: statistics.median(samples) for path, samples in times.items()}


def tune(
    geometries: Iterable[Geometry],
    device: torch.device,
    measure: Callable[[Geometry, torch.device], dict[str, float]] = measure,
    report: Callable[[str], None] = print,
) -> dict[str, str]:
    """bucket -> fastest path, for the buckets that the geometries fall into.

    Args:
        measure: microseconds of each path of a geometry.
        report: called with a line per bucket.
    """
    table: dict[str, str] = {}
    for geometry in geometries:
        key = bucket(geometry)
        if key in table:
            continue
        times = measure(geometry, device)
        table[key] = min(times, key=times.get)
        report(f"{key}: {table[key]}  ({', '.join(f'{path} {t:.0f} us' for path, t in times.items())})")
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gradaug tune", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME")
    parser.add_argument("--widths", nargs="+", type=float, default=WIDTHS, metavar="WIDTH")
    parser.add_argument("--batch", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), default=("bfloat16",))
    parser.add_argument("--out", type=Path, default=TUNING, help="folder of the table (default: the package's)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("gradaug tune needs an NVIDIA GPU that torch can use, found none")

    device = torch.device("cuda", torch.cuda.current_device())
    dtypes = [getattr(torch, name) for name in options.dtypes]
    table = tune(layers(options.networks, options.widths, options.batch, dtypes), device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{card_name(device)}.json"
    versions = {"card": torch.cuda.get_device_name(device), "torch": torch.__version__, "batch": options.batch}
    path.write_text(json.dumps({**versions, "paths": table}, indent=1, sort_keys=True) + "\n")
    print(f"{len(table)} buckets -> {path}")
    return 0
