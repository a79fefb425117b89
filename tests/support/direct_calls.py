"""Every operator of torch.ops.gradaug, called as no Python function of the package would: each argument out of range.

Run as a program, it makes the calls and prints a line for each that raised no error, after the name of each before it
is made, so that the last line names the call that ended the process. `--reference` hides the native kernels.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

NHWC, NCHW = torch.channels_last, torch.contiguous_format
HUGE = 2**40
NO_RANGE = {"momentum"}  # any number is as good as any other

# Tensor arguments that must not have another size along a dimension, a character for each: "=" must be what it is,
# "+" may be larger, "-" smaller but not empty, "z" anything but empty, "*" anything.
GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
SIZES = {
    "slim_conv2d": {"x": "*-zz", "weight": "++zz", "bias": "+"},
    "slim_conv2d_input_grad": {"dy": "=-==", "weight": "++=="},
    "slim_conv2d_weight_grad": {"dy": "=-==", "x": "=-==", "weight": "++=="},
    "slim_conv2d_weight_grad_": {"dy": "=-==", "x": "=-==", "dweight": "++=="},
    "slim_linear": {"x": "*-", "weight": "++", "bias": "+"},
    "slim_linear_input_grad": {"dy": "*-", "weight": "++"},
    "slim_linear_weight_grad": {"dy": "=-", "x": "=-", "weight": "++"},
    "slim_linear_weight_grad_": {"dy": "=-", "x": "=-", "dweight": "++"},
    "slim_batch_norm": {"x": "====", "weight": "+", "bias": "+", "mean": "=", "var": "=", "residual": "===="},
    "slim_batch_norm_backward": {
        **{"dy": "====", "x": "====", "y": "===="},
        **{"weight": "+", "bias": "+", "mean": "=", "var": "="},
    },
    "slim_batch_norm_record_": {"running_mean": "+", "running_var": "+", "num_batches": "", "mean": "=", "var": "="},
    "slim_channel_statistics": {"x": "****"},
    "slim_max_pool2d": {"x": "*zzz"},
    "slim_max_pool2d_backward": {"dy": "====", "y": "====", "offset": "===="},
}
CONV, NORM = SIZES["slim_conv2d"], {"mean": "=", "var": "=", "gamma": "+", "beta": "+"}
OUT = {"out_mean": "=", "out_var": "=", "out_gamma": "+", "out_beta": "+"}
SIZES |= {
    "slim_batch_norm_precomputed": SIZES["slim_batch_norm"],
    "slim_conv2d_statistics": CONV,
    "slim_norm_conv2d": {**CONV, **NORM, "x": "*=zz"},
    "slim_norm_conv2d_backward": {"dy": "=-==", "x": "====", **NORM, "weight": "++=="},
    "slim_norm_conv2d_backward_": {"dy": "=-==", "x": "====", **NORM, "weight": "++==", "dweight": "++=="},
    "slim_conv2d_norm": {**CONV, **NORM, **OUT, "x": "====", "residual": "===="},
    "slim_conv2d_norm_backward": {"dy": "====", "x": "====", "y": "====", **NORM, "weight": "++==", "bias": "+", **OUT},
    "slim_norm_max_pool2d": {"x": "*=zz", **NORM},
    "slim_norm_max_pool2d_backward": {"dy": "====", "y": "====", "offset": "====", "x": "====", **NORM},
}
SIZES["slim_conv2d_norm_backward_"] = {**SIZES["slim_conv2d_norm_backward"], "dweight": "++=="}


def operators() -> list[str]:
    """The names of all operators of the package but those of one device, which others call, and the private ones.

    Those read no tensor's memory: `_conv_paths` and the like (tests/ops/test_paths.py).
    """
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("gradaug::")}
    names = {name.removeprefix("gradaug::") for name in names}
    return sorted(name for name in names if not name.endswith("_cuda_cpp") and not name.startswith("_"))


def arguments_of(name: str) -> list:
    return getattr(torch.ops.gradaug, name).default._schema.arguments


def valid_arguments(name: str, dtype: torch.dtype, memory_format: torch.memory_format, groups: int) -> dict:
    """A call in range. x is [2, 6, 5, 7] or, for a linear layer, [4, 6]; weights are used whole."""
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    linear, pool = name.startswith("slim_linear"), "max_pool" in name
    image = torch.zeros(2, 6, 5, 7, dtype=dtype).contiguous(memory_format=memory_format)
    rows = torch.zeros(4, 6, dtype=dtype)
    out = torch.zeros(2, 6, 3, 4, dtype=dtype).contiguous(memory_format=memory_format) if pool else image.clone()
    weight = torch.zeros(6, 6, dtype=dtype) if linear else torch.zeros(6, 6 // groups, 3, 3, dtype=dtype)
    channels, ones = torch.zeros(6, dtype=stats), torch.ones(6, dtype=stats)
    found = {
        **{"x": rows if linear else image, "dy": rows.clone() if linear else out, "y": out, "residual": out.clone()},
        **{"weight": weight, "dweight": weight.clone(), "bias": torch.zeros(6, dtype=dtype)},
        **{"mean": channels, "var": ones, "gamma": ones, "beta": channels},
        **{"out_mean": channels, "out_var": ones, "out_gamma": ones, "out_beta": channels},
        **{"running_mean": channels.clone(), "running_var": ones.clone(), "num_batches": torch.tensor(1)},
        **{"values": 70, "momentum": 0.1, "eps": 1e-5, "out_eps": 1e-5},
        **{"out_channels": 6, "out_features": 6, "in_features": 6, "input_size": [2, 6, 5, 7]},
        **{"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": groups},
        "offset": torch.full(out.shape, 4, dtype=torch.uint8).contiguous(memory_format=memory_format),
    }
    if pool:
        found |= {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]}
    arguments = {a.name: found.get(a.name, True) for a in arguments_of(name)}  # what is left are booleans
    if name.startswith("slim_batch_norm") and not name.endswith("_"):
        arguments |= {"weight": ones, "bias": channels}
    return arguments


def resized(t: Tensor, dim: int, size: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = size
    return t.new_zeros(shape).contiguous(memory_format=NHWC if t.dim() == 4 and t.stride(1) == 1 else NCHW)


def bad_tensors(name: str, argument, arguments: dict, groups: int) -> Iterator[tuple[str, object]]:
    t = arguments[argument.name]
    if str(argument.type) == "Tensor":
        yield "None", None
    elif argument.name in ("mean", "var", "out_mean", "out_var"):
        yield "None without the other", None
    rows = name in ("slim_linear", "slim_linear_input_grad") and argument.name in ("x", "dy")  # of any batch shape
    if t.dim() > 0 and not rows:
        yield "a dimension less", t[0]
    if not rows:
        yield "a dimension more", t[None].expand(2, *t.shape).contiguous()
    alone = sum(torch.is_tensor(value) for value in arguments.values()) == 1
    # Where gradients and running statistics are gathered, and weights that lend but their shape, are of any dtype.
    gathers = name == "slim_batch_norm_record_" or argument.name == "dweight"
    if not alone and not gathers and (name.split("_")[-2:], argument.name) != (["weight", "grad"], "weight"):
        yield "another dtype", t.to(torch.float32 if t.dtype == torch.float64 else torch.float64)
    for dtype in (torch.int32, torch.bool, torch.complex64):
        yield str(dtype), t.to(dtype)
    if not alone:
        yield "on another device", t.to("meta")
    for dim, kind in enumerate(SIZES[name][argument.name]):
        # Channels of groups of one channel cannot change alone.
        if groups > 1 and kind == "-" and "linear" not in name:
            kind = "="
        # Not one row more: the last may be in no window of stride 2.
        for change in {"=": (2, -1, 0), "+": (-1, 0), "-": (1, 0), "z": (0,), "*": ()}[kind]:
            yield f"size {change:+d} in dimension {dim}", resized(t, dim, t.shape[dim] + change if change else 0)
    if argument.is_write and t.dim() > 0:
        yield "expanded", t[:1].expand_as(t)
        if t.dim() > 1:
            yield "overlapping", t.as_strided(t.shape, [1] * t.dim())
        for other in ("running_var", "mean") if name == "slim_batch_norm_record_" else ("x", "dy"):
            read = arguments[other]
            if argument.name != other and (argument.name, other) != ("running_var", "mean"):
                yield f"in the memory of {other}", t.new_empty(0).set_(read.untyped_storage(), 0, t.shape)


def bad_values(name: str, argument, arguments: dict, groups: int) -> Iterator[tuple[str, object]]:
    """Values of one argument that do not fit the others."""
    value = arguments[argument.name]
    if torch.is_tensor(value):
        yield from bad_tensors(name, argument, arguments, groups)
    elif argument.name == "input_size":
        for dim in range(4):
            for change in (1, -1, HUGE, -HUGE):
                # Another number of input channels is that of another sub-network.
                if dim == 1 and change == -1 and groups == 1 and "conv" in name:
                    continue
                change = 2 if change == 1 else change  # the last pixel may be in no window of stride 2
                yield f"{change:+d} in dimension {dim}", [v + change * (d == dim) for d, v in enumerate(value)]
        yield "three sizes", value[:3]
    elif isinstance(value, list):
        least = 0 if argument.name == "padding" else 1
        for bad in ([least - 1, least], [least, least - 1], [-HUGE, 1], [HUGE, 1], [1, HUGE], [1, 1, 1], [], None):
            yield str(bad), bad
    elif argument.name == "groups":
        for bad in (0, -1, 4, HUGE, None):
            yield str(bad), bad
    elif argument.name in ("out_channels", "out_features", "in_features"):
        for bad in (0, -1, 7, HUGE, -HUGE, None):
            yield str(bad), bad
    elif argument.name == "values":
        for bad in (1, 0, -3):
            yield str(bad), bad
    elif argument.name in ("eps", "out_eps"):
        yield "negative", -1.0


def variants() -> Iterator[tuple[str, torch.dtype, torch.memory_format, int]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for memory_format in (NHWC, NCHW):
            for groups in (1, 6):
                yield (
                    f"{str(dtype)[6:]}, {'NHWC' if memory_format == NHWC else 'NCHW'}, {groups} groups",
                    *(dtype, memory_format, groups),
                )


def calls(name: str) -> Iterator[tuple[str, dict, bool]]:
    """What is called, the arguments, and whether they are in range."""
    for variant, *options in variants():
        arguments = valid_arguments(name, *options)
        yield f"{name} ({variant})", arguments, True
        for argument in arguments_of(name):
            for what, bad in bad_values(name, argument, arguments, options[-1]):
                yield f"{name} ({variant}): {argument.name}: {what}", {**arguments, argument.name: bad}, False


def outcome(call, arguments: dict) -> str:
    try:
        call(arguments)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def cuda_rules() -> dict[str, object]:
    """name -> what serves the operator on CUDA, but for the kernels, which trust what they are given."""
    from gradaug_kernels._gpu import operators
    from gradaug_kernels._gpu.paths import UNMEASURED

    operators.card_of = lambda device: UNMEASURED
    operators.kernel_for = lambda geometry, device: lambda *arguments: None
    operators.fuses_norms = lambda geometry, device: False
    operators.norm_kernels = lambda: SimpleNamespace(slim_channel_statistics_triton=lambda x: None)
    rules = operators.CONVOLUTIONS | operators.LINEARS | operators.NORMED_CONVOLUTIONS
    return {op._schema.name.removeprefix("gradaug::"): rule for op, rule in rules.items()}


def main() -> None:
    rules = cuda_rules()
    for name in operators():
        op = getattr(torch.ops.gradaug, name).default
        serving = {"": lambda arguments, op=op: op(**arguments)}
        if name in rules:
            serving["by CUDA's rule"] = lambda arguments, rule=rules[name]: rule(*arguments.values())
        for what, arguments, in_range in calls(name):
            for where, call in serving.items():
                print(f"calling {what} {where}", flush=True)
                found = outcome(call, arguments)
                if (found == "no error") != in_range:
                    print(f"WRONG {what} {where}: {found.splitlines()[0]}", flush=True)
    print("done")


if __name__ == "__main__":
    if "--reference" in sys.argv:
        exists = Path.exists
        Path.exists = lambda path: path.name != "_build.json" and exists(path)
    import gradaug_kernels  # noqa: F401

    main()
