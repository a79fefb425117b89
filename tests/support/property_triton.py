"""The Triton kernels of the convolutions, in Triton's interpreter, on the cases of property_cases.py.

The interpreter is chosen by TRITON_INTERPRET before triton is imported. It multiplies bfloat16 wrongly, and takes long.
"""

import torch
from support.property_cases import NCHW, NHWC, ConvCase, Layout, Norm, conv_cases, values
from support.property_checks import REFUSALS, assert_close, assert_one_sentence, call_of

__all__ = ["NCHW", "NHWC", "ConvCase", "Layout", "Norm", "check_triton"]


def triton_cases(operators, budget: int):
    def is_short(case: ConvCase) -> bool:
        """The interpreter takes seconds for many taps and groups; what is depthwise has a kernel of its own."""
        taps = case.kernel[0] * case.kernel[1]
        depthwise = case.groups == case.shape[1] == case.out and case.groups > 1
        return taps <= 25 and not case.before if depthwise else taps * case.groups <= 25

    cases = conv_cases(operators, budget, dtype=values("float32", "float16"), threads=1, parameters=None, needs=())
    return cases.filter(is_short)


def check_triton(case: ConvCase) -> str:
    call = call_of(case)
    try:
        found = (_norm_conv2d if case.before else _conv2d)(call)
    except REFUSALS as error:
        if call.may_be_refused():
            assert_one_sentence(error)
            return "refused"
        raise
    expected = call.expected()
    for name, result in found.items():
        assert_close(name, result, expected[name])
    call.assert_unchanged()
    return "computed"


def _output_gradient(call, y: torch.Tensor) -> torch.Tensor:
    call.dy = call.make.lay_out(call.make.randn(*y.shape) + 0.25, call.case.dy, y.dtype)
    return call.dy


def _buffer(call) -> torch.Tensor:
    """Where the weight's gradient goes: the case's buffer, or zeros."""
    if call.buffer is None:
        call.buffer = torch.full_like(call.tensors["weight"], torch.nan)
        call.buffer[call.slice_of("weight")] = 0
        call.old = call.buffer.clone()
    return call.buffer


def _conv2d(call) -> dict[str, torch.Tensor]:
    from gradaug_kernels._gpu.paths import DIRECTIONS, paths_built

    case, (x, weight, bias) = call.case, (call.tensors[n] for n in ("x", "weight", "bias"))
    depthwise = case.groups == case.shape[1] == case.out and case.groups > 1
    kernels = paths_built()["depthwise" if depthwise else "triton"]
    forward, input_grad, weight_grad = (kernels[direction] for direction in DIRECTIONS)
    y = forward(x, weight, bias, case.out, *case.geometry)
    dy, dweight = _output_gradient(call, y), _buffer(call)
    dx = input_grad(dy, weight, x.shape, *case.geometry)
    weight_grad(dy, x, dweight, *case.geometry)
    return {"y": y, "dx": dx} | call.gradient("weight", None)


def _norm_conv2d(call) -> dict[str, torch.Tensor]:
    from gradaug_kernels._gpu.triton import slim_norm_conv2d as kernels

    case, norm, t = call.case, call.case.before, call.tensors
    given = (t["mean"], t["var"], t["gamma"], t["beta"])
    batch_stats = norm.statistics != "given"
    conv = (t["weight"], t["bias"], case.out, *case.geometry)
    results = kernels.slim_norm_conv2d_triton(t["x"], *given, batch_stats, norm.relu, norm.eps, *conv, case.statistics)
    found = dict(zip(("y", "mean", "var", "y_mean", "y_var"), results, strict=True))
    if not case.statistics:
        del found["y_mean"], found["y_var"]
    dy, dweight = _output_gradient(call, found["y"]), _buffer(call)
    statistics = (found["mean"], found["var"], t["gamma"], t["beta"], batch_stats, norm.relu, norm.eps)
    dx, dgamma, dbeta = kernels.slim_norm_conv2d_backward__triton(
        dy, t["x"], *statistics, t["weight"], dweight, *case.geometry, True, True
    )
    found |= {"dx": dx} | call.gradient("weight", None)
    for name, gradient in (("gamma", dgamma), ("beta", dbeta)):
        if t[name] is not None:
            found |= call.gradient(name, gradient)
    return found
