"""`python -m benchmarks throughput`: what each sub-network costs in evaluation, before one chooses widths.

ours runs the sub-network inside the full one; the baselines run a plain network of that width, its weights copied out.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import gradaug_kernels as gk

from .cases import Network
from .gate import Gate, check, speedups
from .memory import peak_bytes
from .providers import autocast_dtype
from .rows import Row, Table, make_row, speedup_cells
from .timing import Workload, interleave, quantiles, seconds, synchronize


class EvaluationRun:
    """A network on a fixed batch, without gradients; calling it returns the logits."""

    def __init__(self, model: nn.Module, images: torch.Tensor, dtype: str, width: float | None = None):
        self.model, self.images, self.width = model, images, width
        self.autocast_dtype = autocast_dtype(dtype)

    def __call__(self):
        with (
            torch.no_grad(),
            torch.autocast(self.images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None),
        ):
            return self.model(self.images)

    def set_width(self) -> None:
        """Before a sample: ours is one model for all widths."""
        if self.width is not None:
            gk.set_width(self.model, self.width)


def slimmable(net: Network, widths: Sequence[float], divisor: int, device: torch.device) -> nn.Module:
    """A converted network with statistics for every width, calibrated on one random batch."""
    model = gk.convert(net.build(device), widths=widths, divisor=divisor).to(memory_format=torch.channels_last).eval()
    gk.calibrate(model, widths, [net.images_and_targets(device)[0]])
    return model


def extracted(net: Network, model: nn.Module, width: float, device: torch.device) -> nn.Module:
    """A plain network, dense and packed, equal to the sub-network of `width` of `model` in evaluation."""
    channels = {}
    hooks = [
        module.register_forward_hook(lambda m, args, y, name=name: channels.update({name: (args[0].shape, y.shape)}))
        for name, module in model.named_modules()
        if isinstance(module, gk.FastSlimConv2d | gk.SlimLinear | gk.SlimBatchNorm2d)
    ]
    with torch.no_grad(), gk.use_width(model, width):
        model(net.images_and_targets(device)[0][:1])
    for hook in hooks:
        hook.remove()
    statistics = "" if width == 1.0 else f"_{width!r}".replace(".", "_")
    plain, slim = net.build(device), dict(model.named_modules())
    for name, (x, y) in channels.items():
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, _dense(slim[name], x, y, statistics))
    return plain.to(device, memory_format=torch.channels_last).eval()


def _dense(layer: nn.Module, x: torch.Size, y: torch.Size, statistics: str) -> nn.Module:
    """The torch.nn layer that maps an input of shape x to an output of shape y as `layer` does."""
    out, bias = y[1], layer.bias is not None
    if isinstance(layer, nn.BatchNorm2d):
        dense = nn.BatchNorm2d(out, layer.eps, layer.momentum)
        for name in ("running_mean", "running_var"):
            getattr(dense, name).copy_(getattr(layer, name + statistics)[:out])
    elif isinstance(layer, nn.Linear):
        dense = nn.Linear(x[1], out, bias)
    else:
        groups = x[1] * layer.groups // layer.in_channels if layer.groups > 1 else 1
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        dense = nn.Conv2d(x[1], out, *geometry, groups, bias)
    with torch.no_grad():
        dense.weight.copy_(layer.weight[tuple(slice(size) for size in dense.weight.shape)])
        if bias:
            dense.bias.copy_(layer.bias[:out])
    return dense


def make_runs(
    net: Network, width: float, dtype: str, providers: Sequence[str], device: torch.device
) -> tuple[dict[str, EvaluationRun], Gate]:
    images, _ = net.images_and_targets(device)
    model = slimmable(net, [width], 1, device)
    plain = extracted(net, model, width, device)
    every = {
        "ours": EvaluationRun(model, images, dtype, width),
        "eager": EvaluationRun(plain, images, dtype),
    }
    every["ours"].set_width()
    double = copy.deepcopy(plain).double()
    reference = EvaluationRun(double, images.double(), "fp32")()
    gate = check({"logits": every["ours"]()}, {"logits": every["eager"]()}, {"logits": reference})
    if "compile" in providers:
        torch._dynamo.reset()
        every["compile"] = EvaluationRun(torch.compile(copy.deepcopy(plain)), images, dtype)
    if "eager8" in providers:
        multiple = extracted(net, slimmable(net, [width], 8, device), width, device)
        every["eager8"] = EvaluationRun(multiple, images, dtype)
    return {name: every[name] for name in providers}, gate


def profile_network(net: Network, width: float, device: torch.device) -> tuple[float, int]:
    """GFLOP of one image (two per multiply-add) and parameters of the sub-network."""
    plain = extracted(net, slimmable(net, [width], 1, device), width, device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(net.images_and_targets(device)[0][:1])
    return counter.get_total_flops() / 1e9, sum(p.numel() for p in plain.parameters())


def run_throughput(
    net: Network, widths: Sequence[float], dtype: str, providers: Sequence[str], repeats: int, device: torch.device
) -> list[Row]:
    """Images per second at the network's batch and the latency of one image, for each width."""
    table = Table(
        "width",
        *("GFLOP", "params M", "provider", "images/s", "batch ms", "1 image ms", "peak MB", "x eager", "x best"),
        width=8,
    )
    rows = []
    for width in tqdm(widths, desc="widths", disable=None):
        gflop, params = profile_network(net, width, device)
        for bench, batch in (("throughput", net.batch), ("latency", 1)):
            rows += _measure(bench, net.resized(batch, None), width, dtype, providers, repeats, device, gflop, params)
        both = rows[-2 * len(providers) :]
        for batch, single in zip(both[: len(providers)], both[len(providers) :], strict=True):
            figures = (batch.rate, batch.median_ms, single.median_ms, batch.peak_mb)
            table.line(f"{width:g}", gflop, params / 1e6, batch.provider, *figures, *speedup_cells(batch))
    return rows


def _measure(
    bench: str,
    net: Network,
    width: float,
    dtype: str,
    providers: Sequence[str],
    repeats: int,
    device: torch.device,
    gflop: float,
    params: int,
) -> list[Row]:
    runs, gate = make_runs(net, width, dtype, providers, device)
    first = {name: seconds(run, device) for name, run in runs.items()}
    samples = interleave({name: Workload(run.set_width, {"run": run}) for name, run in runs.items()}, device, repeats)
    quantile = {name: quantiles(samples[name]["run"]) for name in providers}
    ratios = speedups({name: q.median_ms for name, q in quantile.items()}, gate)
    case = f"{net.name} b{net.batch} {net.size}px"
    rows = []
    for name, q in quantile.items():
        figures = dict(q._asdict(), first_s=first[name], peak_mb=peak_bytes(runs[name], device) / 1e6)
        figures |= {"rate": 1e3 * net.batch / q.median_ms, "unit": "images/s", "width": width}
        if name != "eager8":  # its sub-network has other channels
            figures |= {"gflop": gflop, "params": params}
        if name == "ours":
            figures |= {"gate": "green" if gate.green else "red", "x_eager": ratios[0], "x_best": ratios[1]}
        rows.append(make_row(bench, case, name, dtype, device, repeats, **figures))
    return rows


def test_throughput(benchmark, net, dtype, provider, width, device):
    runs, gate = make_runs(net, width, dtype, [provider], device)
    if provider == "ours":
        assert gate.green, gate
    run = runs[provider]
    run.set_width()

    def batch():
        run()
        synchronize(device)

    benchmark.pedantic(batch, rounds=10, warmup_rounds=2)
    benchmark.extra_info.update(width=width, images_per_s=net.batch / benchmark.stats["median"])
