"""`check(case)`: call an operator as a case of property_cases.py says, and compare all that it returns with float64.

Outside of slices memory is NaN, and must still be; with `guard`, tensors lie beside pages that may not be touched. A
check that meets a fault raises AssertionError, or the operator's own exception. An operator may refuse an image without
rows or columns, in one sentence; what it computes must be right.
"""

import ctypes
import mmap

import torch
import torch.nn.functional as F
from support.property_cases import NCHW, NHWC, BatchNormCase, Case, ConvCase, Layout, LinearCase, Norm, PoolCase
from support.property_oracle import (
    Approx,
    batch_norm,
    batch_norm_backward,
    channel_sum,
    conv2d,
    conv2d_input_grad,
    conv2d_weight_grad,
    linear,
    matmul,
    max_pool,
    max_pool_backward,
    moments,
    relu,
    relu_backward,
    unit,
)
from torch import Tensor
from torch._prims_common import suggest_memory_format

import gradaug_kernels as gk

__all__ = ["NCHW", "NHWC", "BatchNormCase", "ConvCase", "Layout", "LinearCase", "Norm", "PoolCase", "check"]
REFUSALS = (ValueError, TypeError, RuntimeError)


# ---- memory


class GuardedMemory:
    """Blocks between pages that may not be touched: one element too far ends the process. `reset` frees all."""

    def __init__(self):
        self.blocks: dict[int, list[int]] = {}  # pages -> addresses of blocks
        self.used: dict[int, int] = {}

    def reset(self) -> None:
        self.used = dict.fromkeys(self.used, 0)

    def tensor(self, elements: int, dtype: torch.dtype, at: str) -> Tensor:
        """[elements] that end (at="end") or start at a page that may not be touched."""
        size = elements * dtype.itemsize
        if size == 0:
            return torch.empty(0, dtype=dtype)
        pages = -(-size // mmap.PAGESIZE)
        index = self.used.get(pages, 0)
        self.used[pages] = index + 1
        blocks = self.blocks.setdefault(pages, [])
        if index == len(blocks):
            blocks.append(self._map(pages * mmap.PAGESIZE))
        address = blocks[index] + (pages * mmap.PAGESIZE - size if at == "end" else 0)
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)

    @staticmethod
    def _map(size: int) -> int:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        start = libc.mmap(None, size + 2 * mmap.PAGESIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert libc.mprotect(start + mmap.PAGESIZE, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        return start + mmap.PAGESIZE


MEMORY = GuardedMemory()


class Maker:
    """The tensors of a case: random values, laid out."""

    def __init__(self, case: Case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def memory(self, elements: int, dtype: torch.dtype) -> Tensor:
        if self.case.guard:
            return MEMORY.tensor(elements, dtype, self.case.guard).fill_(torch.nan)
        return torch.full((elements,), torch.nan, dtype=dtype)

    def lay_out(self, values: Tensor, layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
        """The values [...] as a tensor of that layout; NaN in the wider tensor around it."""
        dtype = dtype or self.case.torch_dtype
        nothing, shape = (0,) * values.dim(), values.shape
        before, after, step = layout.before or nothing, layout.after or nothing, layout.step or (1,) * values.dim()
        for d in layout.expanded:
            values = values.narrow(d, 0, min(1, shape[d]))
        sizes = [
            b + max(0, (size - 1) * s + 1) + a for size, b, a, s in zip(values.shape, before, after, step, strict=True)
        ]
        strides, total = [0] * values.dim(), 1
        for d in reversed(layout.order or range(values.dim())):
            strides[d], total = total, total * max(1, sizes[d])
        whole = self.memory(0 if 0 in sizes else total, dtype).as_strided(sizes, strides)
        for d, (size, b, s) in enumerate(zip(values.shape, before, step, strict=True)):
            whole = whole.narrow(d, b, max(0, (size - 1) * s + 1))
            whole = whole[(slice(None),) * d + (slice(None, None, s),)]
        return whole.copy_(values).expand(shape)

    def full_width(self, values: Tensor, wider: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> Tensor:
        """A parameter whose first channels are the values and the others NaN."""
        wider = (*wider, *(0,) * (values.dim() - len(wider)))
        full = values.new_full([size + more for size, more in zip(values.shape, wider, strict=True)], torch.nan)
        full[_first(values.shape)] = values
        return self.lay_out(full, layout, dtype)


def _first(shape) -> tuple:
    return tuple(slice(size) for size in shape)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_tensors(make: Maker, norm: Norm, channels: int, x: Tensor | None, center: float = 0.0, spread: float = 1.0):
    """mean, var [C], gamma, beta [F]: None where the norm has none. x: what `known` statistics are taken of."""
    dtype = stats_dtype(make.case.torch_dtype)
    layout = Layout(step=(norm.step,))
    tensors = {"mean": None, "var": None}
    if norm.statistics == "given":
        tensors["mean"] = center + spread * make.randn(channels)
        tensors["var"] = spread**2 * (make.randn(channels).square() + 0.5)
    elif norm.statistics == "known":
        mean, var = (part.value for part in moments(Approx.of(x), unit(make.case.torch_dtype)))
        tensors["mean"], tensors["var"] = mean, var
    made = {n: None if t is None else make.lay_out(t, layout, dtype) for n, t in tensors.items()}
    for name, kind, middle in (("gamma", norm.gamma, 1.0), ("beta", norm.beta, 0.0)):
        made[name] = None
        if kind:
            values = middle + make.randn(channels) / 2
            kind = make.case.torch_dtype if kind == "x" else dtype
            made[name] = make.full_width(values, (norm.wider,), layout, kind)
    return made


# ---- one check


def check(case: Case) -> str:
    """Raises AssertionError with what is wrong; returns "computed", or "refused" where the contract has no answer."""
    call = call_of(case)
    try:
        found = call.run()
    except REFUSALS as error:
        if call.may_be_refused():
            assert_one_sentence(error)
            return "refused"
        raise
    torchs = None
    for name, expected in call.expected().items():
        result = found.pop(name)
        try:
            assert_close(name, result, expected)
        except AssertionError:
            torchs = torchs or call.torchs()
            if name not in torchs or not as_accurate(result, torchs[name], expected, call.case.torch_dtype):
                raise
    assert not found, f"results that nothing is compared with: {sorted(found)}"
    call.assert_unchanged()
    again = call.run()
    for name, tensor in call.run_results.items():
        assert torch.equal(again[name].nan_to_num(), tensor.nan_to_num()), f"{name} differs from run to run"
    return "computed"


def call_of(case: Case) -> "Call":
    MEMORY.reset()
    torch.set_num_threads(case.threads)
    calls = {ConvCase: ConvCall, LinearCase: LinearCall, BatchNormCase: BatchNormCall, PoolCase: PoolCall}
    return calls[type(case)](case)


def assert_one_sentence(error: Exception) -> None:
    message = str(error).strip()
    assert message, f"{type(error).__name__} must say what was expected"
    assert "\n" not in message, f"{type(error).__name__} must be one sentence, got: {message}"


def assert_close(name: str, found: Tensor, expected: Approx) -> None:
    assert found.shape == expected.value.shape, f"{name} must be {tuple(expected.value.shape)}, got {found.shape}"
    if found.numel() == 0:
        return
    assert expected.value.isfinite().all()
    error = (found.double() - expected.value).abs()
    allowed = expected.error.nan_to_num(torch.inf, torch.inf)  # of an infinite bound times 0, NaN is left
    wrong = ~(error <= allowed) & (allowed < torch.inf)
    if wrong.any():
        worst = torch.where(wrong, (error / allowed.clamp_min(1e-300)).nan_to_num(torch.inf, torch.inf), 0).argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, found.shape)) if found.dim() else ()
        raise AssertionError(
            f"{name}{list(at)} must be {expected.value[at]:.6g} within {expected.error[at]:.1e}, got {found[at]:.6g}; "
            f"{int(wrong.sum())} of {found.numel()} values are wrong"
        )


def as_accurate(found: Tensor, torchs: Tensor, expected: Approx, dtype: torch.dtype) -> bool:
    """Whether the largest error is at most twice PyTorch's, which must be one that rounding explains."""
    ours, theirs = ((t.double() - expected.value).abs().max() for t in (found, torchs))
    explained = theirs <= 32 * torch.finfo(dtype).eps * expected.value.abs().max()
    return bool(explained and ours <= 2 * theirs + expected.error.max())


class Call:
    """An operator, called as a case says. `tensors` are its arguments by name; `run` gives results by name."""

    case: Case

    def __init__(self, case):
        self.case = case
        self.u = unit(case.torch_dtype)
        self.make = Maker(case)
        self.tensors: dict[str, Tensor | None] = {}
        self.prepare()
        self.before = {name: t.clone() for name, t in self.tensors.items() if t is not None}
        self.old = None if self.buffer is None else self.buffer.clone()
        self.dy = None

    buffer: Tensor | None = None

    def needs(self) -> list[str]:
        return [n for n in self.case.needs or self.differentiable() if self.tensors[n] is not None]

    def run(self) -> dict[str, Tensor]:
        """Results and gradients, each [...] of the slice alone; what lies outside of it is compared here."""
        leaves = {name: self.tensors[name].detach().requires_grad_() for name in self.needs()}
        if self.buffer is not None:
            self.buffer.copy_(self.old)
        function, arguments = self.function(**(self.tensors | leaves))
        results = self.named(function(**arguments))
        y = results["y"]
        self.check_results(results)
        found = {name: t.detach() for name, t in results.items()}
        if self.dy is None:
            values = self.make.randn(*y.shape) + 0.25
            self.dy = self.make.lay_out(values, self.case.dy, y.dtype)
            self.before["dy"] = self.dy.clone()
        if leaves:
            gradients = torch.autograd.grad(y, list(leaves.values()), self.dy, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                found |= self.gradient(name, gradient)
        self.run_results = dict(found)
        return found

    def gradient(self, name: str, gradient: Tensor | None) -> dict[str, Tensor]:
        argument = self.tensors[name]
        if name == "weight" and self.buffer is not None:
            assert gradient is None, "a weight with a buffer must have no gradient of its own"
            gradient, outside = self.buffer, torch.nan
        else:
            assert gradient is not None, f"{name} must have a gradient"
            assert gradient.dtype == argument.dtype, f"d{name} must be {argument.dtype}, got {gradient.dtype}"
            outside = 0.0
        assert gradient.shape == argument.shape, f"d{name} must be {argument.shape}, got {gradient.shape}"
        own = self.slice_of(name)
        if own is None:
            return {f"d{name}": gradient}
        rest = gradient.clone()
        rest[own] = outside
        untouched = rest.isnan() if outside else rest == 0
        assert untouched.all(), f"d{name} must be {outside} outside of the slice"
        return {f"d{name}": gradient[own]}

    def assert_unchanged(self) -> None:
        for name, tensor in [*self.tensors.items(), ("dy", self.dy)]:
            if tensor is not None and name in self.before:
                same = (tensor == self.before[name]) | (tensor.isnan() & self.before[name].isnan())
                assert same.all(), f"{name} must stay as it was"

    def may_be_refused(self) -> bool:
        return 0 in self.case.shape[2:]

    def check_results(self, results: dict[str, Tensor]) -> None:
        like = [self.tensors[n] for n in ("x", "weight") if self.tensors.get(n) is not None]
        y = results["y"]
        assert y.dtype == self.case.torch_dtype, f"y must be {self.case.torch_dtype}, got {y.dtype}"
        nhwc = any(suggest_memory_format(t) == torch.channels_last for t in like)
        memory_format = torch.channels_last if nhwc else torch.contiguous_format
        assert y.numel() == 0 or y.is_contiguous(memory_format=memory_format), (
            f"y must be {memory_format}, got strides {y.stride()}"
        )
        for name, t in results.items():
            if name != "y":
                assert t.dtype == stats_dtype(y.dtype), f"{name} must be {stats_dtype(y.dtype)}, got {t.dtype}"

    # What an operator says of itself.

    def prepare(self) -> None:
        raise NotImplementedError

    def differentiable(self) -> list[str]:
        raise NotImplementedError

    def function(self, **tensors) -> tuple:
        """The public function and its keyword arguments, given the tensors."""
        raise NotImplementedError

    def named(self, results) -> dict[str, Tensor]:
        """What the function returned, by name."""
        return dict(zip(("y", "mean", "var"), results, strict=True))

    def expected(self) -> dict[str, Approx]:
        raise NotImplementedError

    def torchs(self) -> dict[str, Tensor]:
        """Results of PyTorch in the dtype of x, some of whose sums are less exact than float32 ones."""
        return {}

    def slice_of(self, name: str) -> tuple | None:
        raise NotImplementedError

    # What operators have in common.

    def take_buffer(self, shape) -> None:
        if self.case.buffer:
            dtype = getattr(torch, self.case.buffer)
            self.buffer = self.make.full_width(self.make.randn(*shape), self.case.wider, self.case.buffer_layout, dtype)

    def added_to_buffer(self, dweight: Approx) -> Approx:
        dweight = dweight.stored(self.case.torch_dtype)
        if self.buffer is None:
            return dweight.stored(self.tensors["weight"].dtype)
        old = Approx.of(self.old[self.slice_of("weight")])
        total = (old + dweight).stored(self.buffer.dtype)
        return Approx(total.value, total.error + self.u * (old.size() + dweight.size()))

    def parameter(self, name: str) -> Approx | None:
        """The slice of a weight or bias, which a low-precision x may have rounded to its dtype."""
        tensor = self.tensors[name]
        if tensor is None:
            return None
        own = Approx.of(tensor[self.slice_of(name)])
        return own if tensor.dtype == self.case.torch_dtype else own.stored(self.case.torch_dtype)

    def norm_parameter(self, name: str, channels: int) -> Approx | None:
        return None if self.tensors[name] is None else Approx.of(self.tensors[name][:channels])

    def given(self, mean: str, var: str):
        if self.tensors[mean] is None:
            return None
        return Approx.of(self.tensors[mean]), Approx.of(self.tensors[var])

    def parameter_gradients(self, prefix: str, dgamma: Approx, dbeta: Approx) -> dict[str, Approx]:
        return {
            f"d{prefix}{n}": g.stored(self.tensors[prefix + n].dtype)
            for n, g in (("gamma", dgamma), ("beta", dbeta))
            if self.tensors[prefix + n] is not None
        }

    def wanted(self, results: dict[str, Approx]) -> dict[str, Approx]:
        """Without the gradients that nothing requires."""
        needs = self.needs()
        return {n: r for n, r in results.items() if n[0] != "d" or n[1:] in needs}


class ConvCall(Call):
    case: ConvCase

    def prepare(self) -> None:
        case, make = self.case, self.make
        (_, c, _, _), fan_in = case.shape, case.shape[1] // case.groups * case.kernel[0] * case.kernel[1]
        parameters = getattr(torch, case.parameters) if case.parameters else case.torch_dtype
        x = self.tensors["x"] = make.lay_out(make.randn(*case.shape) + (0.5 if case.before else 0.0), case.x)
        own = (case.out, c // case.groups, *case.kernel)
        weight = make.randn(*own) / fan_in**0.5
        self.tensors["weight"] = make.full_width(weight, case.wider, case.weight, parameters)
        bias = Layout(step=(case.bias_step,))
        bias = make.full_width(make.randn(case.out), case.wider[:1], bias, parameters) if case.bias else None
        self.tensors["bias"] = bias
        if case.before:
            self.tensors |= norm_tensors(make, case.before, c, x, center=0.5)
        if case.after:
            after = norm_tensors(make, case.after, case.out, None)
            self.tensors |= {f"out_{name}": t for name, t in after.items()}
            size = (case.shape[0], case.out, *case.out_size)
            self.tensors["residual"] = make.lay_out(make.randn(*size), case.residual) if case.residual else None
        self.take_buffer(own)

    def slice_of(self, name: str) -> tuple | None:
        case, c = self.case, self.case.shape[1]
        return {
            "weight": _first((case.out, c // case.groups)),
            "bias": _first((case.out,)),
            "gamma": _first((c,)),
            "beta": _first((c,)),
            "out_gamma": _first((case.out,)),
            "out_beta": _first((case.out,)),
        }.get(name)

    def differentiable(self) -> list[str]:
        names = ("x", "weight", "bias", "gamma", "beta", "out_gamma", "out_beta", "residual")
        return [n for n in names if self.tensors.get(n) is not None]

    def function(self, **tensors) -> tuple:
        case = self.case
        arguments = {"out_channels": case.out, "stride": case.stride, "padding": case.padding}
        arguments |= {"dilation": case.dilation, "groups": case.groups, "weight_grad": self.buffer}
        options = {} if case.before is None else {"relu": case.before.relu, "eps": case.before.eps}
        if case.before:
            options["batch_stats"] = case.before.statistics == "known"
        if case.after:
            options |= {"out_relu": case.after.relu, "out_eps": case.after.eps, "normalise": case.before is not None}
        elif case.before:
            options["statistics"] = case.statistics
        return getattr(gk.ops, case.operator), tensors | arguments | options

    def named(self, results) -> dict[str, Tensor]:
        case = self.case
        if case.operator == "slim_conv2d":
            return {"y": results}
        names = {
            "slim_conv2d_statistics": ("y", "y_mean", "y_var"),
            "slim_norm_conv2d": ("y", "mean", "var", "y_mean", "y_var"),
            "slim_conv2d_norm": ("y", "out_mean", "out_var", "mean", "var"),
        }[case.operator]
        found = dict(zip(names, results, strict=True))
        if case.before and not case.statistics and not case.after:
            assert found.pop("y_mean") is found.pop("y_var") is None
        if case.after and not case.before:
            assert found.pop("mean").numel() == found.pop("var").numel() == 0
        return found

    def expected(self) -> dict[str, Approx]:
        case, u, dtype = self.case, self.u, self.case.torch_dtype
        x, weight, bias, dy = Approx.of(self.tensors["x"]), *map(self.parameter, ("weight", "bias")), self.dy
        results, norm, dy = {}, None, Approx.of(dy)
        gamma = beta = None
        if case.before:
            gamma, beta = (self.norm_parameter(n, case.shape[1]) for n in ("gamma", "beta"))
            norm = batch_norm(x, self.given("mean", "var"), gamma, beta, None, case.before.eps, u)
            results |= {"mean": norm.mean, "var": norm.var}
        a = x if norm is None else (relu(norm.z) if case.before.relu else norm.z).stored(dtype)
        y = conv2d(a, weight, bias, case.geometry, u).stored(dtype)
        if case.after:
            own = [self.norm_parameter(f"out_{n}", case.out) for n in ("gamma", "beta")]
            residual = None if self.tensors["residual"] is None else Approx.of(self.tensors["residual"])
            given = self.given("out_mean", "out_var")
            after = batch_norm(y, given, *own, residual, case.after.eps, u)
            results |= {"out_mean": after.mean, "out_var": after.var}
            y = (relu(after.z) if case.after.relu else after.z).stored(dtype)
            dz = relu_backward(dy, y) if case.after.relu else dy
            results["dresidual"] = dz.stored(dtype)
            dy, *parameters = batch_norm_backward(dz, after, own[0], case.after.statistics == "batch", u)
            results |= self.parameter_gradients("out_", *parameters)
            dy = dy.stored(dtype)
        elif case.statistics:
            results |= dict(zip(("y_mean", "y_var"), moments(y, u), strict=True))
        results["y"] = y
        dweight = conv2d_weight_grad(dy, a, weight.value.shape, case.geometry, u)
        results["dweight"] = self.added_to_buffer(dweight)
        if bias is not None:
            results["dbias"] = channel_sum(dy, u).stored(dtype)
        dx = conv2d_input_grad(dy, weight, case.shape, case.geometry, u).stored(dtype)
        if norm is not None:
            dz = relu_backward(dx, norm.z) if case.before.relu else dx
            dx, *parameters = batch_norm_backward(dz, norm, gamma, case.before.statistics != "given", u)
            results |= self.parameter_gradients("", *parameters)
        results["dx"] = dx.stored(dtype)
        return self.wanted(results)

    def torchs(self) -> dict[str, Tensor]:
        case, dtype = self.case, self.case.torch_dtype
        if dtype not in (torch.float16, torch.bfloat16) or 0 in self.tensors["x"].shape:
            return {}
        own = {
            n: t if self.slice_of(n) is None else t[self.slice_of(n)] for n, t in self.tensors.items() if t is not None
        }
        leaves = {n: own[n].detach().clone().requires_grad_() for n in self.needs()}
        t = {n: tensor.contiguous() for n, tensor in (own | leaves).items()}

        def norm(x, options, prefix):
            statistics = (t.get(prefix + "mean"), t.get(prefix + "var"))
            if options.statistics == "known":
                statistics = (None, None)
            parameters = (t.get(prefix + "gamma"), t.get(prefix + "beta"))
            parameters = (None if p is None else p.to(stats_dtype(dtype)) for p in parameters)
            return F.batch_norm(x, *statistics, *parameters, statistics[0] is None, eps=options.eps)

        with torch.backends.mkldnn.flags(enabled=False):
            a = t["x"]
            if case.before:
                a = norm(a, case.before, "")
                a = a.relu() if case.before.relu else a
            bias = t["bias"].to(dtype) if "bias" in t else None
            y = F.conv2d(a, t["weight"].to(dtype), bias, *case.geometry)
            if case.after:
                y = norm(y, case.after, "out_")
                y = y + t["residual"] if "residual" in t else y
                y = y.relu() if case.after.relu else y
            gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.contiguous()) if leaves else ()
        found = {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
        if self.buffer is not None and "dweight" in found:
            found["dweight"] = self.old[self.slice_of("weight")] + found["dweight"].to(self.buffer.dtype)
        return found


class LinearCall(Call):
    case: LinearCase

    def prepare(self) -> None:
        case, make = self.case, self.make
        parameters = getattr(torch, case.parameters) if case.parameters else case.torch_dtype
        own = (case.out, case.shape[-1])
        self.tensors["x"] = make.lay_out(make.randn(*case.shape), case.x)
        weight = make.randn(*own) / own[1] ** 0.5
        self.tensors["weight"] = make.full_width(weight, case.wider, case.weight, parameters)
        bias = Layout(step=(case.bias_step,))
        bias = make.full_width(make.randn(case.out), case.wider[:1], bias, parameters) if case.bias else None
        self.tensors["bias"] = bias
        self.take_buffer(own)

    def slice_of(self, name: str) -> tuple | None:
        return {
            "weight": _first((self.case.out, self.case.shape[-1])),
            "bias": _first((self.case.out,)),
        }.get(name)

    def differentiable(self) -> list[str]:
        return [n for n in ("x", "weight", "bias") if self.tensors[n] is not None]

    def function(self, **tensors) -> tuple:
        return gk.ops.slim_linear, tensors | {"out_features": self.case.out, "weight_grad": self.buffer}

    def named(self, results) -> dict[str, Tensor]:
        return {"y": results}

    def may_be_refused(self) -> bool:
        return False

    def check_results(self, results: dict[str, Tensor]) -> None:
        y = results["y"]
        assert y.dtype == self.case.torch_dtype, f"y must be {self.case.torch_dtype}, got {y.dtype}"

    def expected(self) -> dict[str, Approx]:
        case, u, dtype = self.case, self.u, self.case.torch_dtype
        weight, bias = map(self.parameter, ("weight", "bias"))

        def rows(t: Tensor) -> Approx:
            return Approx.of(t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(0, t.shape[-1]))

        def shaped(a: Approx, size) -> Approx:
            return Approx(*(t.reshape(*case.shape[:-1], size) for t in (a.value, a.error)))

        x, dy = rows(self.tensors["x"]), rows(self.dy)
        transposed = Approx(dy.value.T, dy.error.T)
        results = {
            "y": shaped(linear(x, weight, bias, u), case.out).stored(dtype),
            "dx": shaped(matmul(dy, weight, u), case.shape[-1]).stored(dtype),
            "dweight": self.added_to_buffer(matmul(transposed, x, u)),
            "dbias": channel_sum(dy, u).stored(dtype),
        }
        return self.wanted(results)


class BatchNormCall(Call):
    case: BatchNormCase

    def prepare(self) -> None:
        case, make = self.case, self.make
        x = self.tensors["x"] = make.lay_out(case.center + case.spread * make.randn(*case.shape), case.x)
        self.tensors |= norm_tensors(make, case.norm, case.shape[1], x, case.center, case.spread)
        self.tensors["residual"] = make.lay_out(make.randn(*case.shape), case.residual) if case.residual else None

    def slice_of(self, name: str) -> tuple | None:
        return _first((self.case.shape[1],)) if name in ("gamma", "beta") else None

    def differentiable(self) -> list[str]:
        return [n for n in ("x", "gamma", "beta", "residual") if self.tensors[n] is not None]

    def function(self, gamma, beta, **tensors) -> tuple:
        norm = self.case.norm
        options = {"relu": norm.relu, "eps": norm.eps, "batch_stats": norm.statistics == "known"}
        return gk.ops.slim_batch_norm, tensors | {"weight": gamma, "bias": beta} | options

    def expected(self) -> dict[str, Approx]:
        case, norm, u, dtype = self.case, self.case.norm, self.u, self.case.torch_dtype
        x, dy = Approx.of(self.tensors["x"]), Approx.of(self.dy)
        gamma, beta = (self.norm_parameter(n, case.shape[1]) for n in ("gamma", "beta"))
        residual = None if self.tensors["residual"] is None else Approx.of(self.tensors["residual"])
        normed = batch_norm(x, self.given("mean", "var"), gamma, beta, residual, norm.eps, u)
        y = (relu(normed.z) if norm.relu else normed.z).stored(dtype)
        dz = relu_backward(dy, y) if norm.relu else dy
        dx, *parameters = batch_norm_backward(dz, normed, gamma, norm.statistics != "given", u)
        results = {"y": y, "mean": normed.mean, "var": normed.var, "dx": dx.stored(dtype), "dresidual": dz}
        return self.wanted(results | self.parameter_gradients("", *parameters))


class PoolCall(Call):
    case: PoolCase

    def prepare(self) -> None:
        case, make = self.case, self.make
        values = make.randn(*case.shape)
        values = (2 * values).round() / 2 if case.grid else values
        x = self.tensors["x"] = make.lay_out(values, case.x)
        self.tensors |= norm_tensors(make, case.norm, case.shape[1], x)

    def slice_of(self, name: str) -> tuple | None:
        return _first((self.case.shape[1],)) if name in ("gamma", "beta") else None

    def differentiable(self) -> list[str]:
        return [n for n in ("x", "gamma", "beta") if self.tensors[n] is not None]

    def function(self, **tensors) -> tuple:
        case, norm = self.case, self.case.norm
        options = {"relu": norm.relu, "eps": norm.eps, "batch_stats": norm.statistics == "known"}
        window = {"kernel": case.kernel, "stride": case.stride, "padding": case.padding}
        return gk.ops.slim_norm_max_pool2d, tensors | window | options

    def expected(self) -> dict[str, Approx]:
        case, norm, u, dtype = self.case, self.case.norm, self.u, self.case.torch_dtype
        window = (case.kernel, case.stride or case.kernel, case.padding)
        x, dy = Approx.of(self.tensors["x"]), Approx.of(self.dy)
        gamma, beta = (self.norm_parameter(n, case.shape[1]) for n in ("gamma", "beta"))
        normed = batch_norm(x, self.given("mean", "var"), gamma, beta, None, norm.eps, u)
        a = (relu(normed.z) if norm.relu else normed.z).stored(dtype)
        y = max_pool(a, *window)
        dy = relu_backward(dy, y) if norm.relu else dy
        da = max_pool_backward(dy, a, x.value, *window, u).stored(dtype)
        dx, *parameters = batch_norm_backward(da, normed, gamma, norm.statistics != "given", u)
        results = {"y": y, "mean": normed.mean, "var": normed.var, "dx": dx.stored(dtype)}
        return self.wanted(results | self.parameter_gradients("", *parameters))
