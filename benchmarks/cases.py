"""What is measured: networks, their GradAug step, and their distinct layers at a width."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torchvision.models.resnet import BasicBlock, Bottleneck

import gradaug_kernels as gk
from gradaug_kernels.models import build_model

LARGE_IMAGES = ((0.97, 192), (0.94, 160), (0.9, 128))  # sub-networks (width, pixels) of batches of 224 pixels
SMALL_IMAGES = ((0.95, 32), (0.9, 28), (0.8, 24))  # the same of 32 pixels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = ("resnet50", "wrn-28-10", "mobilenet_v3_large")


@dataclass(frozen=True)
class Network:
    """A model with the batch, image size in pixels and sub-networks [(width, pixels)] it is measured at."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    size: int
    subnets: tuple[tuple[float, int], ...]
    num_classes: int

    def build(self, device: torch.device | str) -> nn.Module:
        """The same random weights each time, such that providers can be compared.

        Dropout is off. The residual branches of ResNets start small: with torchvision's initialisation rounding errors
        grow through the network until bfloat16 gradients have nothing in common with exact ones.
        """
        torch.manual_seed(0)
        with torch.device(device):
            model = self.make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, BasicBlock | Bottleneck):
                nn.init.constant_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight, 0.2)
        return model

    def resized(self, batch: int | None, size: int | None) -> "Network":
        """The same network for another batch and image size; the sub-networks' sizes keep their proportion."""
        size = self.size if size is None else size
        subnets = tuple((width, round(pixels * size / self.size)) for width, pixels in self.subnets)
        batch = self.batch if batch is None else batch
        return Network(self.name, self.make, batch, size, subnets, self.num_classes)

    def images_and_targets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        targets = torch.randint(self.num_classes, (self.batch,), generator=generator)
        return images.to(device, memory_format=torch.channels_last), targets.to(device)


def network(name: str, batch: int | None = None, size: int | None = None) -> Network:
    """A network by name: "wrn-<depth>-<widen factor>" or a classification network of torchvision.

    Raises:
        ValueError: for any other name.
    """
    if wide := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, factor = map(int, wide.groups())
        found = Network(
            name, lambda: build_model("wide_resnet", 100, depth=depth, widen_factor=factor), 32, 32, SMALL_IMAGES, 100
        )
    elif name in torchvision.models.list_models(module=torchvision.models):
        batch_size = 16 if name.startswith("mobilenet") else 8
        found = Network(name, lambda: torchvision.models.get_model(name), batch_size, 224, LARGE_IMAGES, 1000)
    else:
        raise ValueError(f'model must be "wrn-<depth>-<factor>" or a torchvision classifier, got "{name}"')
    return found.resized(batch, size)


@dataclass(frozen=True)
class Layer:
    """One layer as a network calls it at one width, or two that run in one operator, its parts.

    arguments are those of its torch.nn class at full width; x and y the shapes of its input and output. A batch norm
    has residual and relu where the network adds and rectifies its output.
    """

    op: str  # slim_conv2d, slim_linear, slim_batch_norm, or max_pool2d as a part; of two parts their common operator
    arguments: tuple[tuple[str, object], ...]
    width: float
    divisor: int
    slim_out: bool
    x: tuple[int, ...]
    y: tuple[int, ...]
    needs_dx: bool
    residual: bool = False
    relu: bool = False
    parts: tuple["Layer", ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return " | ".join(str(part).removesuffix(f" w{self.width:g}") for part in self.parts) + f" w{self.width:g}"
        options = dict(self.arguments)
        if self.op == "max_pool2d":
            return f"max pool {options['kernel_size']} stride {options['stride']} w{self.width:g}"
        text = f"{self.x[1]}" if self.op == "slim_batch_norm" else f"{self.x[1]}->{self.y[1]}"
        if self.op == "slim_conv2d":
            kernel, stride, groups = options["kernel_size"], options["stride"], options["groups"]
            text += f" {kernel[0]}x{kernel[1]}"
            text += f" stride {stride[0]}" if stride[0] != 1 else ""
            text += "" if groups == 1 else " depthwise" if groups == options["in_channels"] else f" groups {groups}"
        text += " + add" if self.residual else ""
        text += " + relu" if self.relu else ""
        pixels = f" @{self.x[2]}" if len(self.x) == 4 else ""
        return f"{text}{pixels} w{self.width:g}"


_ARGUMENTS = {
    gk.FastSlimConv2d: (
        "slim_conv2d",
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    ),
    gk.SlimLinear: ("slim_linear", ("in_features", "out_features")),
    gk.SlimBatchNorm2d: ("slim_batch_norm", ("num_features", "eps", "momentum")),
    nn.MaxPool2d: ("max_pool2d", ("kernel_size", "stride", "padding")),
}


def called_layers(net: Network, width: float, divisor: int = 1) -> list[Layer]:
    """Every layer of `net` at `width` in the order of its calls, found by hooks while it runs on shapes alone.

    And after them every two that run in one operator.
    """
    calls: list[tuple[str, Layer]] = []

    def record(module, args, output):
        (x,), joined = args, chains.get(names_of[module], "").split(" + ")
        op, names = _ARGUMENTS[type(module)]
        arguments = {name: getattr(module, name) for name in names}
        if op in ("slim_conv2d", "slim_linear"):
            arguments["bias"] = module.bias is not None
        layer = Layer(
            op,
            tuple(arguments.items()),
            width,
            getattr(module, "divisor", 1),
            getattr(module, "slim_out", True),
            tuple(x.shape),
            tuple(output.shape),
            x.requires_grad,
            "add" in joined,
            "relu" in joined,
        )
        calls.append((names_of[module], layer))

    model = gk.convert(net.build("cpu"), divisor=divisor, recompute=True)
    chains = gk.fused_chains(model)  # before there are hooks, with which layers run one by one
    names_of = {module: name for name, module in model.named_modules() if type(module) in _ARGUMENTS}
    for module in names_of:
        module.register_forward_hook(record)
    with gk.use_width(model, width), FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(net.batch, 3, net.size, net.size))
    return [layer for _, layer in calls if layer.op != "max_pool2d"] + _pairs(calls, chains)


def _pairs(calls: list[tuple[str, Layer]], chains: dict[str, str]) -> list[Layer]:
    """The layers that run in one operator, by what each batch norm is said to run with; chains are called in order."""
    found = []
    for i, (name, _) in enumerate(calls):
        chain = chains.get(name, "")
        for op, first, joined in (
            ("slim_conv2d_norm", i - 1, chain.startswith("recomputed convolution")),
            ("slim_norm_conv2d", i, chain.endswith("+ convolution")),
            ("slim_norm_max_pool2d", i, chain.endswith("+ max_pool")),
        ):
            if joined:
                (_, a), (_, b) = calls[first : first + 2]
                found.append(Layer(op, (), a.width, a.divisor, True, a.x, b.y, a.needs_dx, b.residual, parts=(a, b)))
    return found


def distinct_layers(net: Network, width: float) -> dict[Layer, Layer]:
    """Each distinct layer of `net` at `width`, and the same layer where channels are multiples of 8."""
    return dict(zip(called_layers(net, width), called_layers(net, width, divisor=8), strict=True))
