"""The cases that feed correctness, gradients, opcheck, the Triton interpreter, CUDA and the benchmarks' gate.

`conv_cases()`, `linear_cases()` and `batch_norm_cases()` are small: a whole list runs in seconds. Memory outside a
slice is NaN, so that a kernel that reads it fails every comparison.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NHWC, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class ConvCase:
    """One convolution of the sub-network `weight[:out, :in / groups]`; names follow ops/slim_conv2d.py."""

    name: str
    batch: int
    size: tuple[int, int]  # H, W
    channels: tuple[int, int]  # in, out of the sub-network
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    wider: tuple[int, int] = (3, 5)  # channels of the full width beyond the sub-network's: in (per group), out
    bias: bool = False
    x_layout: str = "nhwc"  # nhwc, nchw, wide (a channel slice of a wider NHWC tensor), swapped (W outside H)
    weight_format: torch.memory_format = NHWC

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def out_channels(self) -> int:
        return self.channels[1]

    def slice(self, weight: Tensor) -> Tensor:
        return weight[: self.channels[1], : self.channels[0] // self.groups]  # [out, in / groups, KH, KW]

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [N, C, H, W], weight [O, I / G, KH, KW], bias [O] or None; NaN outside the slices."""
        randn = _generator(dtype, device, seed)
        (c, out), (height, width) = self.channels, self.size
        x = randn(self.batch, c, height, width)
        if self.x_layout == "nhwc":
            x = x.contiguous(memory_format=NHWC)
        elif self.x_layout == "wide":
            wide = torch.full((self.batch, height, width, c + 3), torch.nan, dtype=dtype, device=device)
            wide = wide.permute(0, 3, 1, 2)
            wide[:, :c] = x
            x = wide[:, :c]
        elif self.x_layout == "swapped":
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        group_in = c // self.groups
        full = (out + self.wider[1], group_in + self.wider[0], *self.kernel)
        weight = torch.full(full, torch.nan, dtype=dtype, device=device).contiguous(memory_format=self.weight_format)
        self.slice(weight).copy_(
            randn(out, group_in, *self.kernel) / (group_in * self.kernel[0] * self.kernel[1]) ** 0.5
        )
        return x, weight, _bias(self.bias, full[0], out, randn)


def conv_cases() -> list[ConvCase]:
    one, none = (1, 1), (0, 0)

    def pointwise(name, batch, size, channels, **options):
        return ConvCase(name, batch, size, channels, kernel=one, **{"padding": none, **options})

    def depthwise(name, batch, size, channels, *geometry, multiplier=1, **options):
        options = {"wider": (0, 4), **options}
        return ConvCase(name, batch, size, (channels, channels * multiplier), *geometry, groups=channels, **options)

    return [
        pointwise("1x1", 2, (9, 7), (24, 20)),
        pointwise("1x1 of the full width", 2, (8, 8), (16, 32), wider=none),
        pointwise("1x1 to 129 channels", 1, (7, 7), (7, 129), bias=True),
        pointwise("1x1 from 129 channels", 3, (5, 3), (129, 1)),
        pointwise("1x1 with stride 2", 2, (9, 8), (13, 21), stride=(2, 2)),
        pointwise("1x1 with padding", 2, (4, 5), (6, 5), padding=(1, 2), bias=True),
        pointwise("1x1 with a stride of 3 rows", 1, (8, 7), (5, 9), stride=(3, 1)),
        pointwise("1x1 with stride 2 and padding 1", 2, (6, 7), (16, 18), stride=(2, 2), padding=one),
        pointwise("1x1 on NCHW", 2, (6, 5), (17, 15), x_layout="nchw", weight_format=NCHW),
        pointwise("1x1 on one pixel", 1, one, (33, 18), bias=True),
        ConvCase("3x3", 2, (9, 8), (13, 29)),
        ConvCase("3x3 of the full width", 2, (7, 7), (16, 16), wider=none, bias=True),
        ConvCase("3x3 of 129 channels", 1, (5, 6), (129, 129)),
        ConvCase("3x3 on wide rows", 1, (4, 61), (5, 34)),
        ConvCase("3x3 with stride 2", 2, (9, 8), (7, 17), stride=(2, 2)),
        ConvCase("3x3 with dilation 2", 1, (9, 11), (6, 10), padding=(2, 2), dilation=(2, 2)),
        ConvCase("3x3 without padding", 2, (5, 6), (8, 12), padding=none),
        ConvCase("3x3 with padding beyond the kernel", 1, (4, 3), (4, 6), padding=(4, 3)),
        ConvCase("3x3 on one pixel", 2, one, (9, 7)),
        ConvCase("3x3 on one column", 2, (6, 1), (5, 6), bias=True),
        ConvCase("3x3 from one channel to one", 1, (5, 5), one),
        ConvCase("3x3 on NCHW with OIHW", 2, (6, 7), (11, 13), x_layout="nchw", weight_format=NCHW, bias=True),
        ConvCase("3x3 on NHWC with OIHW", 2, (6, 7), (11, 13), weight_format=NCHW),
        ConvCase("3x3 on NCHW with OHWI", 2, (6, 7), (11, 13), x_layout="nchw"),
        ConvCase("3x3 on a channel slice", 2, (6, 7), (11, 13), x_layout="wide"),
        ConvCase("3x3 on swapped rows and columns", 2, (6, 7), (8, 9), x_layout="swapped"),
        ConvCase("3x5 with asymmetric geometry", 2, (9, 10), (6, 7), (3, 5), (2, 1), (1, 3), (1, 2)),
        ConvCase("2x2 with stride 3", 1, (8, 9), (4, 5), (2, 2), (3, 3), none),
        ConvCase("3x1 with stride 3 and padding 2", 1, (8, 9), (5, 33), (3, 1), (2, 3), (1, 2)),
        ConvCase("7x7 stem", 1, (17, 15), (3, 20), (7, 7), (2, 2), (3, 3), wider=(0, 4)),
        ConvCase("3x3 of an empty batch", 0, (5, 5), (6, 8), bias=True),
        pointwise("1x1 of an empty batch", 0, (5, 5), (6, 8)),
        ConvCase("2 groups", 2, (6, 5), (14, 10), groups=2, bias=True),
        ConvCase("8 groups of 4 channels", 2, (7, 6), (32, 32), groups=8, wider=(1, 8)),
        ConvCase("6 groups of 3 channels, stride 2", 1, (9, 9), (18, 30), stride=(2, 2), groups=6),
        pointwise("1x1 in 3 groups", 2, (4, 5), (9, 12), groups=3),
        ConvCase("4 groups on NCHW", 1, (5, 6), (8, 12), groups=4, x_layout="nchw", weight_format=NCHW),
        depthwise("depthwise 3x3", 2, (9, 8), 37, bias=True),
        depthwise("depthwise 3x3, stride 2", 2, (9, 8), 33, stride=(2, 2)),
        depthwise("depthwise 5x5", 1, (8, 10), 18, kernel=(5, 5), padding=(2, 2)),
        depthwise("depthwise 5x5, stride 2", 2, (11, 9), 16, kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
        depthwise("depthwise of 129 channels", 1, (3, 4), 129),
        depthwise("depthwise with dilation", 1, (9, 9), 7, padding=(2, 2), dilation=(2, 2)),
        depthwise("depthwise with dilation 2 and padding 1", 2, (13, 10), 19, dilation=(2, 2)),
        depthwise("depthwise on NCHW with OIHW", 2, (6, 5), 19, x_layout="nchw", weight_format=NCHW),
        depthwise("depthwise on a channel slice", 2, (6, 5), 19, x_layout="wide"),
        depthwise("depthwise of a weight with more inputs", 1, (6, 5), 6, wider=(2, 2)),
        depthwise("depthwise of an empty batch", 0, (6, 5), 6),
        depthwise("channel multiplier 2", 2, (6, 7), 9, multiplier=2, bias=True),
        depthwise("channel multiplier 3, stride 2", 1, (7, 7), 5, multiplier=3, stride=(2, 2)),
        depthwise("depthwise of 67 channels on wide rows", 1, (4, 71), 67),
        depthwise("depthwise on one pixel", 2, one, 35, bias=True),
        depthwise("depthwise 5x5 on one column", 1, (6, 1), 20, kernel=(5, 5), padding=(2, 2)),
        depthwise("depthwise 5x5 with dilation 2", 1, (11, 9), 17, (5, 5), padding=(4, 4), dilation=(2, 2)),
        depthwise("depthwise with stride 2 and dilation 2", 2, (9, 10), 16, (3, 3), (2, 2), (2, 2), (2, 2)),
        depthwise("depthwise 3x5 with asymmetric geometry", 2, (9, 10), 18, (3, 5), (2, 1), (1, 3), (1, 2)),
        depthwise("depthwise 7x7", 1, (8, 9), 21, kernel=(7, 7), padding=(3, 3), bias=True),
        depthwise("depthwise 2x2 with stride 3", 1, (8, 9), 33, (2, 2), (3, 3), none),
        depthwise("depthwise 1x1 with stride 2", 2, (5, 6), 19, one, (2, 2), none),
        depthwise("depthwise with padding beyond the kernel", 1, (4, 3), 18, padding=(4, 3)),
        depthwise("depthwise on a channel slice, stride 2", 2, (7, 6), 67, stride=(2, 2), x_layout="wide"),
        depthwise("depthwise on NHWC with OIHW", 1, (6, 5), 18, weight_format=NCHW),
        ConvCase("9 groups of 2 channels", 2, (6, 7), (18, 18), groups=9, bias=True),
        ConvCase("5 groups of 4 channels, stride 2", 2, (9, 8), (20, 20), stride=(2, 2), groups=5, wider=(1, 8)),
        ConvCase("3 groups of 8 channels", 2, (7, 6), (24, 24), groups=3, wider=(2, 8), x_layout="wide"),
        ConvCase("5x5 in 6 groups of 4 channels", 1, (7, 8), (24, 24), (5, 5), padding=(2, 2), groups=6),
        ConvCase("3 groups of 16 channels, dilation 2", 1, (7, 6), (48, 48), (3, 3), one, (2, 2), (2, 2), 3),
        ConvCase("4 groups of 4 channels, dilation 3", 1, (9, 11), (16, 16), (3, 2), (2, 1), (2, 1), (3, 2), 4),
        ConvCase("groups of an empty batch", 0, (7, 6), (16, 16), groups=4),
    ]


def named(*cases) -> dict:
    """{name: case}, by which tests choose some of them."""
    found = {case.name: case for case in cases}
    assert len(found) == len(cases), "cases must have names of their own"
    return found


# Of each kind some, for what takes long or hardly depends on the case.
SOME_CONVS = (
    "1x1",
    "1x1 with stride 2",
    "1x1 on NCHW",
    "3x3 of 129 channels",
    "3x3 without padding",
    "3x3 from one channel to one",
    "3x3 on a channel slice",
    "3x1 with stride 3 and padding 2",
    "2 groups",
    "4 groups on NCHW",
    "depthwise 5x5, stride 2",
    "depthwise on NCHW with OIHW",
    "channel multiplier 2",
    "depthwise 5x5 on one column",
    "depthwise 7x7",
    "depthwise on a channel slice, stride 2",
    "3 groups of 8 channels",
    "groups of an empty batch",
)


@dataclass(frozen=True)
class LinearCase:
    """One linear layer of the sub-network `weight[:out, :features]`."""

    name: str
    batch: tuple[int, ...]
    features: int
    out_features: int
    wider: tuple[int, int] = (3, 5)  # features of the full width beyond the sub-network's: in, out
    bias: bool = True
    x_layout: str = "rows"  # rows, wide (a slice of wider rows), columns (features outermost)
    weight_layout: str = "rows"  # rows, columns

    def slice(self, weight: Tensor) -> Tensor:
        return weight[: self.out_features, : self.features]  # [out, F]

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., F], weight [O, I], bias [O] or None; NaN outside the slices."""
        randn = _generator(dtype, device, seed)
        x = randn(*self.batch, self.features)
        if self.x_layout == "wide":
            wide = torch.full((*self.batch, self.features + 3), torch.nan, dtype=dtype, device=device)
            wide[..., : self.features] = x
            x = wide[..., : self.features]
        elif self.x_layout == "columns":
            x = x.movedim(-1, 0).contiguous().movedim(0, -1)
        full = (self.out_features + self.wider[1], self.features + self.wider[0])
        weight = torch.full(full, torch.nan, dtype=dtype, device=device)
        if self.weight_layout == "columns":
            weight = weight.t().contiguous().t()
        self.slice(weight).copy_(randn(self.out_features, self.features) / self.features**0.5)
        return x, weight, _bias(self.bias, full[0], self.out_features, randn)


def linear_cases() -> list[LinearCase]:
    return [
        LinearCase("a slice", (6,), 24, 20),
        LinearCase("the full width", (8,), 16, 32, wider=(0, 0)),
        LinearCase("129 to 7", (5,), 129, 7),
        LinearCase("7 to 129", (129,), 7, 129, bias=False),
        LinearCase("one to one", (1,), 1, 1),
        LinearCase("an odd number of rows", (33,), 65, 49),
        LinearCase("more batch dimensions", (2, 3, 4), 10, 9),
        LinearCase("no batch dimension", (), 12, 7),
        LinearCase("an empty batch", (0,), 12, 7),
        LinearCase("rows of a wider tensor", (4, 3), 21, 11, x_layout="wide"),
        LinearCase("features outermost", (7,), 18, 13, x_layout="columns", bias=False),
        LinearCase("features outermost, batch of two dimensions", (3, 5), 18, 13, x_layout="columns"),
        LinearCase("a transposed weight", (9,), 14, 15, weight_layout="columns"),
    ]


@dataclass(frozen=True)
class BatchNormCase:
    """One batch norm with the first channels of full-width parameters; names follow ops/slim_batch_norm.py."""

    name: str
    shape: tuple[int, int, int, int]  # N, C, H, W
    residual: bool = False
    relu: bool = False
    given: bool = False  # normalise with given statistics instead of the batch's
    weight: str | None = "stats"  # stats (float32; float64 where x is), x (the dtype of x), None
    bias: str | None = "stats"
    wider: int = 3  # elements of the full-width parameters beyond the sub-network's
    x_layout: str = "nhwc"  # nhwc, nchw, wide, wide_nchw (channel slices of wider tensors), swapped (W outside H)
    others_layout: str | None = None  # layout of residual and dy where it is another one
    center: float = 1.0  # the data's mean
    spread: float = 2.0  # and standard deviation

    @property
    def channels(self) -> int:
        return self.shape[1]

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        """x, residual, dy [N, C, H, W]; weight, bias [F], NaN from C on; mean, var [C]. None where there is none."""
        randn = _generator(dtype, device, seed)
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        exact = _generator(torch.float64, device, seed + 1)

        def parameter(kind: str | None, center: float) -> Tensor | None:
            if kind is None:
                return None
            full = torch.full((self.channels + self.wider,), torch.nan, dtype=dtype if kind == "x" else stats_dtype)
            full[: self.channels] = center + exact(self.channels).cpu() / 2
            return full.to(device)

        others = self.others_layout or self.x_layout
        x = self._lay_out(self.center + self.spread * exact(*self.shape), self.x_layout).to(dtype)
        statistics = (None, None)
        if self.given:
            mean, var = exact(self.channels), exact(self.channels).square() + 0.5
            statistics = (self.center + mean, self.spread**2 * var)
        return {
            "x": x,
            "weight": parameter(self.weight, 1),
            "bias": parameter(self.bias, 0),
            "mean": None if statistics[0] is None else statistics[0].to(stats_dtype),
            "var": None if statistics[1] is None else statistics[1].to(stats_dtype),
            "residual": self._lay_out(randn(*self.shape), others) if self.residual else None,
            "dy": self._lay_out(randn(*self.shape) + 0.25, others),
        }

    def _lay_out(self, values: Tensor, layout: str) -> Tensor:
        if layout == "nhwc":
            return values.contiguous(memory_format=NHWC)
        if layout == "swapped":
            return values.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "nchw":
            return values
        n, c, height, width = self.shape
        wide = values.new_full((n, c + 5, height, width), torch.nan)
        wide = wide.contiguous(memory_format=NHWC if layout == "wide" else NCHW)
        wide[:, 2 : c + 2] = values
        return wide[:, 2 : c + 2]


def batch_norm_cases() -> list[BatchNormCase]:
    def case(name, *shape, **options):
        return BatchNormCase(name, shape, **options)

    both = {"residual": True, "relu": True}
    return [
        case("64 channels", 4, 64, 8, 8, **both),
        case("243 channels", 2, 243, 6, 5, **both),
        case("129 channels of 1 pixel", 5, 129, 1, 1, relu=True),
        case("7 channels", 3, 7, 9, 7, **both),
        case("33 channels, an odd number of pixels", 1, 33, 7, 9, residual=True),
        case("one channel", 5, 1, 6, 3, relu=True),
        case("one channel of one pixel", 3, 1, 1, 1),
        case("one value per channel", 1, 9, 1, 1, relu=True),
        case("two values per channel", 2, 40, 1, 1, residual=True),
        case("an empty batch", 0, 8, 5, 5, **both),
        case("an empty batch with given statistics", 0, 8, 5, 5, given=True),
        case("NCHW", 4, 13, 7, 9, x_layout="nchw", **both),
        case("NCHW of one channel", 3, 1, 5, 7, x_layout="nchw"),
        case("NCHW of one image", 1, 37, 5, 5, x_layout="nchw", relu=True),
        case("NCHW of one pixel", 6, 18, 1, 1, x_layout="nchw", **both),
        case("a channel slice", 2, 40, 6, 5, x_layout="wide", **both),
        case("a channel slice of NCHW", 2, 40, 6, 5, x_layout="wide_nchw", **both),
        case("swapped rows and columns", 2, 17, 6, 5, x_layout="swapped", **both),
        case("NHWC among NCHW", 2, 24, 6, 5, others_layout="nchw", **both),
        case("NCHW among NHWC", 2, 24, 6, 5, x_layout="nchw", others_layout="nhwc", **both),
        case("given statistics", 2, 35, 6, 5, given=True, **both),
        case("given statistics on NCHW", 2, 35, 6, 5, given=True, x_layout="nchw", relu=True),
        case("without weight and bias", 2, 48, 5, 5, weight=None, bias=None, **both),
        case("without bias", 2, 48, 5, 5, bias=None, relu=True),
        case("without weight", 2, 48, 5, 5, weight=None, residual=True),
        case("parameters in the dtype of x", 2, 48, 5, 5, weight="x", bias="x", **both),
        case("parameters of the full width", 2, 48, 5, 5, wider=0, **both),
        case("large mean", 3, 50, 7, 7, center=1000.0, spread=0.25, relu=True),
        case("large mean on NCHW", 3, 50, 7, 7, center=-1000.0, spread=0.25, x_layout="nchw"),
        case("small variance", 3, 50, 7, 7, center=0.0, spread=1e-4, relu=True),
    ]


def _generator(dtype: torch.dtype, device: str, seed: int):
    """randn(*shape): the same values, rounded to dtype, on every device and in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _bias(wanted: bool, full: int, out: int, randn) -> Tensor | None:
    """[full], NaN from `out` on."""
    if not wanted:
        return None
    bias = randn(full)
    bias[out:] = torch.nan
    return bias
