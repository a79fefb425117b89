"""Calls of the operators as values: what a property test draws, prints when it fails, and shrinks.

A case is a frozen dataclass of numbers and strings whose repr is a call that makes it again, so that

    cd tests && python -c 'from property_checks import *; check(ConvCase(...))'

repeats a failure. `conv_cases()`, `linear_cases()`, `batch_norm_cases()` and `pool_cases()` are strategies of
hypothesis; what comes first in a list is what shrinking ends at.
"""

import math
from dataclasses import dataclass, fields

import torch
from hypothesis import strategies as st

DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
LOW_PRECISION = ("bfloat16", "float16")
# Small, prime, and around the widths of vectors.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 32, 33, 48, 61, 64, 67, 96, 97, 128, 131)
ORDINARY, LARGE = 2 * 10**5, 10**7  # products in the forward pass of a case


class Printed:
    """A repr without the fields that have their default."""

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def _repr_pretty_(self, printer, cycle) -> None:  # what hypothesis prints
        printer.text(repr(self))


def values(*choices):
    return st.sampled_from(choices)


# ---- tensors


@dataclass(frozen=True, repr=False)
class Layout(Printed):
    """Where a tensor's elements lie: a slice of a wider tensor, whose dimensions lie in `order`, outermost first."""

    order: tuple[int, ...] = ()  # () is that of the dimensions
    before: tuple[int, ...] = ()  # elements of the wider tensor before the slice, in each dimension; () is none
    after: tuple[int, ...] = ()
    step: tuple[int, ...] = ()  # the slice takes every step-th element; () is each
    expanded: tuple[int, ...] = ()  # dimensions whose stride is 0

    @staticmethod
    def of(order=(), before=(), after=(), step=(), expanded=()) -> "Layout":
        """Without what says nothing."""
        order = () if list(order) == sorted(order) else order
        return Layout(order, *(t if any(t) else () for t in (before, after)), step, expanded)

    def __repr__(self) -> str:
        return {(): "NCHW", (0, 2, 3, 1): "NHWC"}[self.order] if self in (NCHW, NHWC) else super().__repr__()


NCHW, NHWC = Layout(), Layout(order=(0, 2, 3, 1))
ORDERS = (
    (0, 2, 3, 1),
    (0, 1, 2, 3),
    (0, 1, 3, 2),
    (0, 3, 2, 1),
    (1, 0, 2, 3),
    (2, 3, 0, 1),
    (1, 2, 3, 0),
    (3, 2, 1, 0),
)


@st.composite
def image_layouts(draw, expanded=True):
    """Of [N, C, H, W]: often dense, often a slice of channels, sometimes anything that strides can say."""
    kind = draw(values("dense", "dense", "channels", "pixels", "any", *(("expanded",) if expanded else ())))
    if kind == "dense":
        return draw(values(NHWC, NHWC, NHWC, NCHW, NCHW, *(Layout.of(order=order) for order in ORDERS[2:])))
    order = draw(values(*ORDERS[:2], *ORDERS[:2], *(ORDERS[2:] if kind == "any" else ())))
    few = values(0, 0, 1, 2, 3)
    if kind == "channels":
        return Layout.of(order, (0, draw(few), 0, 0), (0, draw(values(1, 2, 3, 5)), 0, 0))
    if kind == "pixels":
        return Layout.of(order, (0, 0, draw(few), draw(few)), (0, 0, draw(few), draw(few)))
    subsets = [(1,), (2, 3), (0,), (0, 1, 2, 3), (1, 2, 3), (3,), (2,), (0, 2, 3)]
    if kind == "expanded":
        return Layout.of(order, expanded=draw(st.sampled_from(subsets)))
    four = st.tuples(*[few] * 4)
    step = draw(values((), (), (1, 2, 1, 1), (1, 1, 2, 2), (2, 1, 1, 3)))
    return Layout.of(order, draw(four), draw(four), step, draw(values((), (), *subsets)) if expanded else ())


@st.composite
def weight_layouts(draw):
    """Of [O, I, KH, KW]."""
    order = draw(values(*ORDERS[:2], *ORDERS[:2], *ORDERS[:2], *ORDERS))
    if draw(values(False, False, False, True)):
        few = values(0, 1, 2)
        return Layout.of(order, *(draw(st.tuples(few, few, few, few)) for _ in range(2)))
    return Layout.of(order)


@st.composite
def matrix_layouts(draw, dimensions, expanded=True):
    order = tuple(range(dimensions))
    if dimensions > 1:
        order = draw(values(order, order, (*range(dimensions - 2), dimensions - 1, dimensions - 2), order[::-1]))
    kind = draw(values("dense", "dense", "slice", *(("expanded",) if expanded and dimensions else ())))
    if kind == "slice":
        few = st.tuples(*[values(0, 1, 3)] * dimensions)
        return Layout.of(
            order, draw(few), draw(few), draw(values((), (), (1,) * (dimensions - 1) + (2,)))[-dimensions:]
        )
    if kind == "expanded":
        return Layout.of(order, expanded=tuple(d for d in range(dimensions) if draw(st.booleans())))
    return Layout.of(order)


# ---- what all cases have


@dataclass(frozen=True, repr=False)
class Case(Printed):
    dtype: str = "float32"
    x: Layout = NCHW
    dy: Layout = NCHW  # of the output's gradient
    needs: tuple[str, ...] = ()  # the arguments that require a gradient; () is all
    seed: int = 0
    threads: int = 1
    guard: str | None = None  # "end", "start": each tensor ends or starts at a page that may not be touched

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def common(draw) -> dict:
    return {
        "dtype": draw(values("float32", "float32", "bfloat16", "float64", "bfloat16", "float16")),
        "seed": draw(values(0, 1, 2, 3)),
        "threads": draw(values(1, 1, 1, 1, 3)),
        "guard": draw(values(None, None, "end", "start")),
    }


def subset(draw, names) -> tuple[str, ...]:
    """Mostly all, which is (), else one or some of the names."""
    kind = draw(values("all", "all", "all", "one", "some"))
    if kind == "one":
        return (draw(st.sampled_from(names)),)
    some = tuple(name for name in names if kind == "some" and draw(st.booleans()))
    return () if some == tuple(names) else some


# ---- convolutions, with norms before and after


@dataclass(frozen=True, repr=False)
class Norm(Printed):
    """A batch norm's own arguments."""

    statistics: str = "batch"  # batch, given, known: given, and said to be the batch's
    gamma: str | None = None  # the dtype: "x" that of x, "statistics" that of mean and var
    beta: str | None = None
    wider: int = 0  # elements of the full-width parameters beyond the channels
    step: int = 1  # between the elements of parameters and statistics
    relu: bool = False
    eps: float = 1e-5


@st.composite
def norms(draw, known=True):
    kinds = (None, "statistics", "x")
    return Norm(
        statistics=draw(values("batch", "batch", "given", *(("known",) if known else ()))),
        gamma=draw(values(*kinds)),
        beta=draw(values(*kinds)),
        wider=draw(values(0, 1, 5)),
        step=draw(values(1, 1, 1, 2)),
        relu=draw(st.booleans()),
        eps=draw(values(1e-5, 1e-5, 1e-3)),
    )


@dataclass(frozen=True, repr=False)
class ConvCase(Case):
    """slim_conv2d; with `statistics` slim_conv2d_statistics, with norms slim_norm_conv2d or slim_conv2d_norm.

    before and after are the norms of x and of the convolution's result; without `after`, `statistics` asks
    slim_norm_conv2d for those of y.
    """

    shape: tuple[int, int, int, int] = (1, 1, 1, 1)  # of x
    out: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    wider: tuple[int, int] = (0, 0)  # channels of the full width beyond the slice: out, in (of a group)
    weight: Layout = NCHW
    bias: bool = False
    bias_step: int = 1  # between its elements
    parameters: str | None = None  # dtype of weight and bias where it is not that of x
    buffer: str | None = None  # dtype of the buffer that takes the weight's gradient; None is no buffer
    buffer_layout: Layout = NCHW
    statistics: bool = False
    before: Norm | None = None
    after: Norm | None = None
    residual: Layout | None = None

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple(
            (self.shape[2 + a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a]
            + 1
            for a in (0, 1)
        )

    @property
    def operator(self) -> str:
        if self.after:
            return "slim_conv2d_norm"
        return "slim_norm_conv2d" if self.before else "slim_conv2d_statistics" if self.statistics else "slim_conv2d"


@st.composite
def axes(draw, kernel=None):
    """Kernel, stride, padding, dilation and size of one axis of an image.

    Every residue of the padding by the stride and by the dilation comes up as often as any other, and so does every
    residue of the kernel by the stride.
    """
    kernel = draw(values(1, 2, 3, 4, 5, 6, 7)) if kernel is None else kernel
    stride, dilation = draw(values(1, 2, 3, 4)), draw(values(1, 2, 3, 4) if kernel > 1 else values(1, 1, 1, 2))
    period = math.lcm(stride, dilation)
    padding = draw(st.sampled_from(range(period))) + period * draw(values(0, 0, 1))
    least = dilation * (kernel - 1) + 1 - 2 * padding
    size = max(draw(values(1, 1, 1, 1, 0)), least) + draw(values(0, 0, 1, 2, 3, 4, 5, 6, 8, 11))
    return kernel, stride, padding, dilation, size


def outputs(kernel, stride, padding, dilation, size) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@st.composite
def geometries(draw):
    """Two axes, of kernels 1x1, square, a row, a column, or any."""
    kind = draw(values("1x1", "square", "square", "1xk", "kx1", "any"))
    size = values(2, 3, 4, 5, 6, 7)
    square = draw(size) if kind == "square" else None
    vertical = {"1x1": 1, "1xk": 1, "square": square}.get(kind)
    horizontal = {"1x1": 1, "kx1": 1, "square": square}.get(kind)
    alike = draw(values(True, False))  # the same stride, padding and dilation along both axes
    first = draw(axes(vertical))
    if alike and (horizontal or first[0]) == first[0]:
        return first, (*first[:4], first[4] + draw(values(0, 1, 2, 4)))
    return first, draw(axes(horizontal))


@st.composite
def channel_groups(draw):
    """Groups, and the input and output channels of one."""
    kind = draw(values("dense", "dense", "dense", "depthwise", "depthwise", "small", "any"))
    if kind == "dense":
        return 1, draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    if kind == "depthwise":
        return draw(st.sampled_from(SIZES[1:])), 1, draw(values(1, 1, 1, 2, 3))
    if kind == "small":
        size = draw(values(2, 4, 8))
        return draw(values(2, 3, 4, 5, 8, 16, 17)), size, size
    sizes = values(1, 2, 3, 4, 5, 8, 12, 16, 17)
    return draw(values(2, 3, 4, 5)), draw(sizes), draw(sizes)


@st.composite
def conv_cases(draw, operators=("slim_conv2d",), budget=None, **fixed):
    operator = draw(st.sampled_from(operators))
    if budget is None:
        budget = draw(values(*[ORDINARY] * 40, LARGE))
    options = common(draw) | {k: v if not isinstance(v, st.SearchStrategy) else draw(v) for k, v in fixed.items()}
    vertical, horizontal = draw(geometries())
    groups, group_in, group_out = draw(channel_groups())
    batch = draw(values(1, 1, 2, 2, 3, 5, 0))
    if budget == LARGE:
        batch, vertical, horizontal = batch * 2, *((*a[:4], a[4] + 13) for a in (vertical, horizontal))
    pixels = outputs(*vertical) * outputs(*horizontal) * vertical[0] * horizontal[0]
    while max(1, batch) * groups * group_in * group_out * pixels > budget:
        if batch > 2:
            batch = 2
        elif groups > 2 and groups >= max(group_in, group_out):
            groups = (groups + 2) // 2
        elif max(group_in, group_out) > 1 and group_in >= group_out:
            group_in = (group_in + 1) // 2
        elif group_out > 1:
            group_out = (group_out + 1) // 2
        elif batch > 1:
            batch = 1
        else:
            break
    kernel, stride, padding, dilation, size = zip(vertical, horizontal, strict=True)
    names = ["x", "weight"]
    bias = draw(st.booleans())
    names += ["bias"] if bias else []
    norm = {}
    if operator != "slim_conv2d":
        norm["statistics"] = operator == "slim_conv2d_statistics" or draw(st.booleans())
    if operator == "slim_norm_conv2d" or (operator == "slim_conv2d_norm" and draw(st.booleans())):
        norm["before"] = before = draw(norms())
        names += [name for name in ("gamma", "beta") if getattr(before, name)]
    if operator == "slim_conv2d_norm":
        norm["after"] = after = draw(norms(known=False))
        names += [f"out_{name}" for name in ("gamma", "beta") if getattr(after, name)]
        norm["residual"] = draw(st.one_of(st.none(), image_layouts()))
        names += ["residual"] if norm["residual"] else []
        norm["statistics"] = False
    lowered = options["dtype"] in LOW_PRECISION
    buffer = draw(values(None, None, "float32", options["dtype"], *DTYPES))
    needs = subset(draw, names)
    if buffer and needs and "weight" not in needs:
        needs = (*needs, "weight")
    return ConvCase(
        shape=(batch, groups * group_in, *size),
        out=groups * group_out,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        wider=(draw(values(0, 0, 1, 3, 8)), draw(values(0, 0, 1, 3, 8))),
        x=draw(image_layouts()),
        dy=draw(image_layouts()),
        weight=draw(weight_layouts()),
        bias=bias,
        bias_step=draw(values(1, 1, 1, 3)) if bias else 1,
        **{
            "needs": needs,
            "parameters": "float32" if lowered and draw(st.booleans()) else None,
            "buffer": buffer,
            "buffer_layout": draw(weight_layouts()) if buffer else NCHW,
        }
        | norm
        | options,
    )


# ---- linear layer


@dataclass(frozen=True, repr=False)
class LinearCase(Case):
    shape: tuple[int, ...] = (1,)  # of x
    out: int = 1
    wider: tuple[int, int] = (0, 0)  # features of the full width beyond the slice: out, in
    weight: Layout = NCHW
    bias: bool = False
    bias_step: int = 1
    parameters: str | None = None
    buffer: str | None = None
    buffer_layout: Layout = NCHW


@st.composite
def linear_cases(draw):
    options = common(draw)
    batch = draw(values((1,), (), (2,), (7,), (33,), (129,), (2, 3), (3, 1, 5), (0,), (2, 0), (0, 3)))
    features, out = (draw(st.sampled_from((*SIZES, 257, 301))) for _ in range(2))
    if draw(values(*[False] * 40, True)):
        batch, features, out = (131,), features + 256, out + 256
    bias = draw(st.booleans())
    buffer = draw(values(None, None, "float32", options["dtype"], *DTYPES))
    needs = subset(draw, ["x", "weight", *(["bias"] if bias else [])])
    dimensions = len(batch) + 1
    return LinearCase(
        shape=(*batch, features),
        out=out,
        wider=(draw(values(0, 0, 1, 3, 8)), draw(values(0, 0, 1, 3, 8))),
        x=draw(matrix_layouts(dimensions)),
        dy=draw(matrix_layouts(dimensions)),
        weight=draw(matrix_layouts(2, expanded=False)),
        bias=bias,
        bias_step=draw(values(1, 1, 1, 3)) if bias else 1,
        parameters="float32" if options["dtype"] in LOW_PRECISION and draw(st.booleans()) else None,
        buffer=buffer,
        buffer_layout=draw(matrix_layouts(2, expanded=False)) if buffer else NCHW,
        needs=needs if not (buffer and needs) or "weight" in needs else (*needs, "weight"),
        **options,
    )


# ---- batch norm


@dataclass(frozen=True, repr=False)
class BatchNormCase(Case):
    shape: tuple[int, int, int, int] = (1, 1, 1, 1)
    norm: Norm = Norm()
    residual: Layout | None = None
    center: float = 0.0  # of the data
    spread: float = 1.0


@st.composite
def image_shapes(draw, empty_images=True):
    batch, channels = draw(values(1, 2, 3, 5, 8, 0)), draw(st.sampled_from((*SIZES, 243, 256)))
    few = values(1, 2, 3, 4, 5, 7, 8, 9, 13, 16, *((0,) if empty_images else ()))
    height, width = draw(few), draw(few)
    if draw(values(*[False] * 40, True)):
        return 4, channels + 64, height + 16, width + 16
    while batch * channels * height * width > 40000:
        channels = channels // 2 + 1
    return batch, channels, height, width


@st.composite
def batch_norm_cases(draw):
    options = common(draw)
    norm = draw(norms())
    residual = draw(st.one_of(st.none(), image_layouts()))
    names = ["x", *(n for n in ("gamma", "beta") if getattr(norm, n)), *(["residual"] if residual else [])]
    return BatchNormCase(
        shape=draw(image_shapes()),
        x=draw(image_layouts()),
        dy=draw(image_layouts()),
        norm=norm,
        residual=residual,
        center=draw(values(0.0, 1.0, -30.0)),
        spread=draw(values(1.0, 2.0, 0.01)),
        needs=subset(draw, names),
        **options,
    )


# ---- norm and max pooling


@dataclass(frozen=True, repr=False)
class PoolCase(Case):
    """slim_norm_max_pool2d."""

    shape: tuple[int, int, int, int] = (1, 1, 1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] | None = (1, 1)
    padding: tuple[int, int] = (0, 0)
    norm: Norm = Norm()
    grid: bool = False  # the data are multiples of 1/2: many maxima are equal


@st.composite
def pool_cases(draw, budget=ORDINARY):
    options = common(draw)
    norm = draw(norms())
    kernel, stride, padding, size = [], [], [], []
    alike = draw(values(True, True, False))
    for axis in (0, 1):
        k = kernel[0] if axis and alike else draw(values(1, 2, 3, 4, 5, 7, 2, 3, 11))
        kernel.append(k)
        stride.append(stride[0] if axis and alike else draw(values(1, 2, 3, 4)))
        padding.append(padding[0] if axis and alike else draw(st.integers(0, k // 2)))
        size.append(max(1, k - 2 * padding[-1]) + draw(values(0, 1, 2, 3, 5, 8, 13)))
    if draw(values(*[False] * 15, True)):  # padding alone is as large as the kernel
        empty = draw(values((0,), (1,), (0, 1)))
        for axis in empty:
            kernel[axis], padding[axis], size[axis] = 2 * kernel[axis], kernel[axis], 0
    batch, channels = draw(values(1, 2, 3, 5, 0)), draw(st.sampled_from(SIZES))
    work = kernel[0] * kernel[1] * max(1, batch) * max(1, size[0]) * max(1, size[1])
    while channels > 1 and work * channels > budget:
        channels = (channels + 1) // 2
    return PoolCase(
        shape=(batch, channels, *size),
        kernel=tuple(kernel),
        stride=draw(values(tuple(stride), tuple(stride), tuple(stride), None)),
        padding=tuple(padding),
        x=draw(image_layouts()),
        dy=draw(image_layouts()),
        norm=norm,
        grid=draw(st.booleans()),
        needs=subset(draw, ["x", *(n for n in ("gamma", "beta") if getattr(norm, n))]),
        **options,
    )
