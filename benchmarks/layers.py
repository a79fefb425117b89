"""`python -m benchmarks layers`: the distinct layers of networks at several widths, forward, backward and both."""

from collections.abc import Sequence
from statistics import geometric_mean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradaug_kernels.recipes.memory import keep_freed_blocks

from . import (
    bench_slim_batch_norm,
    bench_slim_conv2d,
    bench_slim_conv2d_norm,
    bench_slim_linear,
    bench_slim_norm_conv2d,
    bench_slim_norm_max_pool2d,
)
from .cases import DTYPES, Layer, distinct_layers, network
from .gate import Gate, check, speedups
from .memory import peak_bytes
from .rows import Row, Table, make_row, speedup_cells
from .timing import Workload, interleave, quantiles, seconds

BENCHES = {
    "slim_conv2d": bench_slim_conv2d,
    "slim_linear": bench_slim_linear,
    "slim_batch_norm": bench_slim_batch_norm,
    "slim_norm_conv2d": bench_slim_norm_conv2d,
    "slim_conv2d_norm": bench_slim_conv2d_norm,
    "slim_norm_max_pool2d": bench_slim_norm_max_pool2d,
}


class LayerRun:
    """One layer of one provider on its inputs: serves the timing, the memory and the gate alike.

    At width 1 the parameters' gradients are new in every sample, as in the first pass of a GradAug step; below it they
    are added to those of the pass before.
    """

    def __init__(self, layer: Layer, module: nn.Module, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(2)

        def draw(shape: tuple[int, ...]) -> Tensor:
            # The same values in every dtype.
            tensor = torch.randn(shape, generator=generator, device=device).to(torch.bfloat16).to(dtype)
            return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

        self.module = module.to(device).to(memory_format=torch.channels_last)
        self.inputs = [draw(layer.x).requires_grad_(layer.needs_dx)]
        if layer.residual:
            self.inputs.append(draw(layer.y).requires_grad_())
        self.dy = draw(layer.y)
        self.autocast_dtype = None if dtype in (torch.float32, torch.float64) else dtype
        self.accumulates = layer.width < 1
        self.y = None
        self.workload = Workload(self.prepare, {"forward": self.forward, "backward": self.backward})

    def prepare(self) -> None:
        self.y = None
        for tensor in self.inputs:
            tensor.grad = None
        if not self.accumulates:
            self.module.zero_grad()

    def forward(self) -> None:
        with torch.autocast(self.dy.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            self.y = self.module(*self.inputs)

    def backward(self) -> None:
        self.y.backward(self.dy)

    def results(self) -> dict[str, Tensor]:
        """y and every gradient of one fresh forward and backward."""
        self.module.zero_grad()
        self.workload.run()
        found = {"y": self.y.detach()}
        found |= {
            f"d{name}": x.grad for name, x in zip(("x", "residual"), self.inputs, strict=False) if x.requires_grad
        }
        return found | {f"d{name}": p.grad.clone() for name, p in self.module.named_parameters()}


def make_layer_run(
    provider: str, layer: Layer, layer8: Layer, dtype: torch.dtype, device: torch.device, state: dict | None = None
) -> LayerRun:
    """The layer of `provider` with the weights of `state`; layer8 is what eager8 runs."""
    bench, layer = BENCHES[layer.op], layer8 if provider == "eager8" else layer
    module = (bench.ours if provider == "ours" else bench.eager)(layer)
    if state is not None:
        module.load_state_dict(state)
    if dtype == torch.float64:
        module.double()
    if provider == "compile":
        torch._dynamo.reset()
        module.compile()
    return LayerRun(layer, module, dtype, device)


def gate_layer(layer: Layer, dtype: torch.dtype, device: torch.device, ours: LayerRun, state: dict) -> Gate:
    eager = make_layer_run("eager", layer, layer, dtype, device, state)
    reference = make_layer_run("eager", layer, layer, torch.float64, device, state)
    return check(ours.results(), eager.results(), reference.results())


def layer_work(layer: Layer, dtype: torch.dtype) -> dict[str, float]:
    bench = BENCHES[layer.op]
    work = bench.work(layer, dtype.itemsize) if bench.UNIT == "GB/s" else bench.work(layer)
    return work | {"total": sum(work.values())}


def run_layers(
    models: Sequence[str],
    widths: Sequence[float],
    batch: int | None,
    size: int | None,
    dtype: str,
    providers: Sequence[str],
    repeats: int,
    device: torch.device,
) -> list[Row]:
    keep_freed_blocks()
    cases = [
        (model, layer, layer8)
        for model in models
        for width in widths
        for layer, layer8 in distinct_layers(network(model, batch, size), width).items()
    ]
    table = Table("forward + backward", *(f"{name} ms" for name in providers), "rate", "x eager", "x best", width=64)
    rows, ratios, red = [], {False: [], True: []}, []
    for model, layer, layer8 in tqdm(cases, desc="layers", disable=None):
        measured, gate = measure_layer(model, layer, layer8, dtype, providers, repeats, device)
        rows += measured
        total = {row.provider: row for row in measured if row.bench.endswith("total")}
        row = total.get("ours", total[providers[0]])
        case = f"{row.case} {layer.op}"
        milliseconds = [total[name].median_ms for name in providers]
        table.line(case, *milliseconds, f"{row.rate:.1f} {row.unit[:2]}", *speedup_cells(row))
        if not gate.green:
            red.append(f"{case}: {gate}")
        elif row.x_best is not None:
            ratios[bool(layer.parts)].append((row.x_eager, row.x_best, case))
    _summarise("layers", ratios[False])
    _summarise("pairs of layers in one operator", ratios[True])
    for case in red:
        tqdm.write(f"no speed-up for {case}")
    return rows


def measure_layer(
    model: str,
    layer: Layer,
    layer8: Layer,
    dtype: str,
    providers: Sequence[str],
    repeats: int,
    device: torch.device,
) -> tuple[list[Row], Gate]:
    torch_dtype = DTYPES[dtype]
    state = BENCHES[layer.op].eager(layer).state_dict()
    runs = {name: make_layer_run(name, layer, layer8, torch_dtype, device, state) for name in providers}
    first = {name: seconds(run.workload.run, device) for name, run in runs.items()}
    ours = runs.get("ours") or make_layer_run("ours", layer, layer8, torch_dtype, device, state)
    gate = gate_layer(layer, torch_dtype, device, ours, state)
    samples = interleave({name: run.workload for name, run in runs.items()}, device, repeats, cover=True)
    peaks = {name: peak_bytes(run.workload.run, device) / 1e6 for name, run in runs.items()}
    rows = []
    for stage, work in layer_work(layer, torch_dtype).items():
        quantile = {name: quantiles(samples[name][stage]) for name in providers}
        ratios = speedups({name: q.median_ms for name, q in quantile.items()}, gate)
        for name in providers:
            figures = dict(quantile[name]._asdict(), first_s=first[name], width=layer.width)
            if name != "eager8":  # its layer has other channels, so other work
                figures |= {"rate": work / quantile[name].median_ms / 1e6, "unit": BENCHES[layer.op].UNIT}
            if stage == "total":
                figures["peak_mb"] = peaks[name]
            if name == "ours":
                figures |= {"gate": "green" if gate.green else "red", "x_eager": ratios[0], "x_best": ratios[1]}
            bench, case = f"{layer.op}.{stage}", f"{model} b{layer.x[0]} {layer}"
            rows.append(make_row(bench, case, name, dtype, device, repeats, **figures))
    return rows, gate


def _summarise(what: str, ratios: list[tuple[float | None, float, str]]) -> None:
    if ratios:
        mean, worst = geometric_mean([best for _, best, _ in ratios]), min(ratios, key=lambda found: found[1])
        tqdm.write(f"{len(ratios)} {what}, geometric mean and worst:")
        tqdm.write(f"against the best baseline {mean:.2f}x, worst {worst[1]:.2f}x ({worst[2]})")
        if all(ratio is not None for ratio, _, _ in ratios):
            worst = min(ratios)
            mean = geometric_mean([ratio for ratio, _, _ in ratios])
            tqdm.write(f"against plain eager {mean:.2f}x, worst {worst[0]:.2f}x ({worst[2]})")
