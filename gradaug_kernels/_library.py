"""How an operator reaches a kernel: the whole dispatch story.

`define` declares an operator with its plain-PyTorch reference, which serves every device from the first day.
`differentiable` attaches the autograd formula, which csrc/autograd.cpp has once more, in C++, for the eager calls of
the most frequent operators. A C++ kernel takes over its device when the native library that registers it is imported
(csrc/*/<op>, last lines); `use_kernel` does the same for a Python (Triton) launcher.

On CUDA several kernels can serve a convolution, and a dispatch key has room for one: a second registration would win
silently. So the rule in _gpu/paths.py owns the key, and the C++ kernel waits under a name of its own,
gradaug::<operator>_cuda_cpp, where `cuda_cpp_kernel` finds it. GRADAUG_CUDA says which kernel the rule prefers.
"""

import functools
import importlib.machinery
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext
from torch.utils.flop_counter import register_flop_formula

from ._sources import digest

_LIBRARY = torch.library.Library("gradaug", "DEF")
_BACKENDS: dict[
    str, dict[str, str]
] = {}  # operator -> {"cpu": "cpp", "cuda": "reference"}; backward operators included
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_AUTOCAST = functools.reduce(
    torch._C.DispatchKeySet.__or__,
    (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}")) for key in _KEYS.values()),
)
CUDA_CHOICES = ("auto", "triton", "cpp", "cudnn", "reference")


def define(schema: str, reference: Callable, fake: Callable, composite: bool = False) -> torch._ops.OpOverload:
    """Declare an operator: its schema, its specification in plain PyTorch, and its output shapes.

    A composite operator only calls other operators of ours; it needs no kernel, and is listed in `backends` only where
    one took it over all the same.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if not composite:
        native = {device: _has_kernel(name, key) for device, key in _KEYS.items()}
        _BACKENDS[name] = {device: "cpp" if native[device] else "reference" for device in _KEYS}
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradaug::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.gradaug, name).default
    if op._schema.is_mutable:
        _refuse_negatives(op)
    return op


def _refuse_negatives(op: torch._ops.OpOverload) -> None:
    """PyTorch's own fallback for lazily negated tensors aborts the process where one is written to."""

    def kernel(*args):
        for argument, value in zip(op._schema.arguments, args, strict=True):
            if argument.alias_info is not None and value is not None and value.is_neg():
                raise ValueError(f"{argument.name} must be memory of its own, got the imaginary part of a conjugate")
        return op(*(value.resolve_neg() if isinstance(value, torch.Tensor) else value for value in args))

    _LIBRARY.impl(_name(op), kernel, "Negative")


def differentiable(
    op: torch._ops.OpOverload, setup_context: Callable, backward: Callable, composition: Callable, cpp: bool = False
) -> Callable:
    """Attach the autograd formula of an operator.

    Args:
        setup_context: (ctx, inputs, output), as torch.autograd.Function's.
        backward: (ctx, saved, needs, *grad_outputs) returns the gradients of the inputs. saved are the saved tensors,
            needs tells which inputs take a gradient. Second derivatives are those of the operators that it calls.
        composition: the operator composed of PyTorch's differentiable ones, which takes its place in function
            transforms (torch.func) and forward mode.
        cpp: csrc/autograd.cpp has the formula once more.

    Returns:
        The operator as an eager layer calls it: the same, without the dispatcher's way to the formula, which takes
        as long as a small layer. Arguments are positional and complete; inside autocast they are cast already.

    Raises:
        ImportError: if native code was built without the formula that it should have.
    """

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = _below_autograd(op, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            # Unpacking may run user code that needs autograd, such as a forward pass that was checkpointed.
            saved = ctx.saved_tensors
            return _below_autograd(backward, ctx, saved, ctx.needs_input_grad, *grads)

    in_cpp = _in_cpp(op) if cpp else None
    _implement_derivatives(op, Formula.apply, composition)
    eager = in_cpp or Formula.apply
    transforms_are_active = torch._C._are_functorch_transforms_active

    def call(*args):
        # Spelled out: this is read once a layer.
        if (
            torch.compiler.is_compiling()
            or transforms_are_active()
            or forward_ad._current_level >= 0
            or (has_torch_function(args) and _is_overridden())
        ):
            return op(*args)
        try:
            return eager(*args)
        except TypeError as error:
            raise _one_sentence(error, op, args) from None

    call.in_python, call.in_cpp = Formula.apply, in_cpp  # for tests, which compare the two
    return call


class Destination:
    """What a weight's gradient is added to: a buffer, or a parameter's .grad as the backward pass finds it.

    Autograd has the gradient where that .grad cannot take it (there is none, or of another kind), and inside
    torch.autograd.grad. Adding counts as a change in place: the buffer's `_version` tells whether there was one.
    csrc/autograd.cpp has the same.
    """

    def __init__(self, weight_grad: torch.Tensor):
        self.given = weight_grad
        self.is_parameter = weight_grad.requires_grad

    def take(self, node: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tensor to add to, and what autograd gets for `given`, which is the node's last input."""
        if torch.compiler.is_compiling():  # a buffer: the compiled graph's own input
            return self.given, None
        if self.is_parameter and not (_has_a_buffer(self.given) and _is_executed(node.next_functions[-1][0], False)):
            gradient = torch.zeros_like(self.given)
            return gradient, gradient
        buffer = self.given.grad if self.is_parameter else self.given
        torch.autograd.graph.increment_version(buffer)
        return buffer, None


def _has_a_buffer(parameter: torch.Tensor) -> bool:
    grad = parameter.grad
    return (
        parameter.requires_grad
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
        and grad is not None
        and not grad.requires_grad
        and (grad.layout, grad.dtype, grad.device) == (torch.strided, parameter.dtype, parameter.device)
        and grad.stride() == parameter.stride()
        and grad.shape == parameter.shape
    )


def has_prehooks(parameter: torch.Tensor) -> bool:
    """Whether autograd's node that adds to its .grad has hooks that see the gradient before (`Node.register_prehook`).

    Only native code can tell; without it, no.
    """
    library = sys.modules.get("gradaug_kernels._autograd")
    return library is not None and library.has_prehooks(parameter)


def _is_executed(node: Any, if_asked_for: bool) -> bool:
    """Whether the backward pass that runs comes to a node; if_asked_for: a leaf that torch.autograd.grad names."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad of this very leaf
        return if_asked_for


def differentiable_into_buffer(
    op: torch._ops.OpOverload, setup_context: Callable, gradients: Callable, cpp: bool = False
) -> Callable:
    """An operator whose weight's gradient is added to a `Destination`; autograd then gets none for it.

    gradients(ctx, saved, needs, dy, weight_grad) returns those of all arguments, None for the weight's, which it adds
    to weight_grad. The others are as in `differentiable`.

    Returns:
        call(*args, weight_grad), args being the operator's: positional, complete, and cast already inside autocast.
        Function transforms and forward mode leave the gradient of a parameter to autograd; they are refused with a
        buffer, as second derivatives are.
    """
    weight = [argument.name for argument in op._schema.arguments].index("weight")

    class IntoBuffer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, weight_grad = args
            ctx.destination = Destination(weight_grad)
            ctx.is_tensor = [isinstance(a, torch.Tensor) for a in args]
            output = _below_autograd(op, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, dy, *_):
            compiling = torch.compiler.is_compiling()
            if torch.is_grad_enabled() and not compiling:
                raise RuntimeError(
                    "a weight's gradient that is added to a buffer has no second derivative (create_graph=True); "
                    "leave gradients to autograd (accumulate=False)"
                )
            saved, destination = ctx.saved_tensors, ctx.destination
            needs = list(ctx.needs_input_grad) if compiling else _executed_inputs(ctx)
            if destination.is_parameter:
                needs[weight] = needs[-1]
            needed = dy is not None and needs[weight]
            weight_grad, for_autograd = destination.take(ctx) if needed else (None, None)
            return *_below_autograd(gradients, ctx, saved, needs[:-1], dy, weight_grad), for_autograd

    in_cpp = _in_cpp(op) if cpp else None
    eager = in_cpp or IntoBuffer.apply

    def call(*args):
        if torch.compiler.is_compiling():
            return IntoBuffer.apply(*args)
        if is_transformed():
            *inputs, weight_grad = args
            if not weight_grad.requires_grad:
                raise RuntimeError(
                    "weight_grad must be None or a parameter inside function transforms (torch.func) and forward mode, "
                    "got a buffer; leave gradients to autograd (accumulate=False)"
                )
            inputs[weight] = weight_grad.to(inputs[weight].dtype)
            return op(*inputs)
        try:
            return eager(*args)
        except TypeError as error:
            raise _one_sentence(error, op, args) from None

    call.in_python, call.in_cpp = IntoBuffer.apply, in_cpp
    return call


def _one_sentence(error: TypeError, op: torch._ops.OpOverload, args: tuple) -> TypeError:
    """What C++ says of arguments of another type prints every tensor."""
    if "incompatible function arguments" not in str(error):
        return error
    types = (f"{argument.type} {argument.name}" for argument in op._schema.arguments)
    return TypeError(
        f"{_name(op)} must be given {', '.join(types)}, got {', '.join(_type_name(value) for value in args)}"
    )


def _type_name(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_type_name, value))}]"
    return type(value).__name__


def composed(op: torch._ops.OpOverload, composition: Callable) -> None:
    """Let PyTorch differentiate a backward operator: its composition of PyTorch's operators takes its place then."""
    _implement_derivatives(op, composition, composition)


def batched(op: torch._ops.OpOverload) -> Callable:
    """Decorate what takes an operator's place inside torch.func.vmap."""

    def register(function):
        _LIBRARY.impl(_name(op), function, "FuncTorchBatchedDecomposition")
        return function

    return register


def not_differentiable(op: torch._ops.OpOverload) -> None:
    """Let an operator that adds to a buffer refuse to be differentiated, or called inside a function transform.

    Its calls count as changes in place wherever they come from: code that torch.compile made has no `Destination`.
    """
    buffer = next(i for i, argument in enumerate(op._schema.arguments) if argument.is_write)

    def refuse(*args):
        raise RuntimeError(f"{_name(op)} adds to a buffer and has no derivative")

    def count_the_change(keyset, *args):
        torch.autograd.graph.increment_version(args[buffer])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _implement_derivatives(op, refuse, refuse)
    _LIBRARY.impl(_name(op), count_the_change, "ADInplaceOrView", with_keyset=True)


def _implement_derivatives(op: torch._ops.OpOverload, apply: Callable, composition: Callable) -> None:
    """What serves an operator where a gradient is asked for, and inside function transforms and forward mode."""

    def kernel(keyset, *args):
        if is_transformed():
            return composition(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(_name(op), kernel, "Autograd", with_keyset=True)
    batched(op)(composition)


def is_transformed() -> bool:
    """Inside a function transform (torch.func) or a level of forward mode, which C++ formulas do not follow."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_overridden() -> bool:
    """Whether functions are overridden by more than torch.set_default_device, which concerns no operator of ours."""
    modes = _get_current_function_mode_stack()
    return not modes or any(not isinstance(mode, DeviceContext) for mode in modes)


def _below_autograd(function: Callable, *args):
    """Call with operators going straight to their kernels, but where their derivatives may be asked for.

    Otherwise each call passes autograd's and autocast's keys, which are Python functions and have nothing to do in the
    forward and backward of an autograd.Function.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return function(*args)
    with torch._C._AutoDispatchBelowADInplaceOrView(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return function(*args)


def _executed_inputs(ctx) -> list[bool]:
    """Which inputs this backward pass wants the gradients of: torch.autograd.grad names some that need one."""
    needs = list(ctx.needs_input_grad)
    nodes = iter(ctx.next_functions)
    for i, is_tensor in enumerate(ctx.is_tensor):
        node = next(nodes)[0] if is_tensor else None
        needs[i] = node is not None and _is_executed(node, True)
    return needs


def count_flops(op: torch._ops.OpOverload, formula: Callable) -> None:
    """What torch.utils.flop_counter counts: formula takes the operator's arguments, tensors as their shapes."""
    register_flop_formula(getattr(torch.ops.gradaug, _name(op)))(lambda *args, out_shape, **kwargs: formula(*args))


def autocast_rule(op: torch._ops.OpOverload) -> Callable:
    """Decorate `rule(dtype, *args)`, which casts an operator's arguments inside torch.autocast."""

    def register(rule):
        for device, key in _KEYS.items():
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))

            def kernel(*args, _device=device, _excluded=excluded):
                dtype = torch.float64 if args[0].dtype == torch.float64 else torch.get_autocast_dtype(_device)
                args = rule(dtype, *args)
                with torch._C._ExcludeDispatchKeyGuard(_excluded):
                    return op(*args)

            _LIBRARY.impl(_name(op), kernel, f"Autocast{key}")
        return rule

    return register


def use_kernel(op: torch._ops.OpOverload, kernel: Callable, device: str, backend: str) -> None:
    """Let `kernel`, which has the reference's signature, serve `op` on `device` ("cpu" or "cuda").

    Raises:
        RuntimeError: if another backend already serves it. torch would silently let the last registration win.
    """
    name = _name(op)
    served = _BACKENDS.setdefault(name, dict.fromkeys(_KEYS, "composite"))
    if served[device] not in ("reference", "composite"):
        raise RuntimeError(f"{name} on {device} must have one kernel, got {backend!r} after {served[device]!r}")
    _LIBRARY.impl(name, kernel, _KEYS[device])
    served[device] = backend


@functools.cache
def cuda_choice() -> str:
    """GRADAUG_CUDA: which kernels serve CUDA tensors, "auto" if it is not set. Read once.

    auto: for each shape the best of all, by table or by rule (_gpu/paths.py). triton, cpp, cudnn: that one for every
    convolution that it can do. reference: no kernel of ours at all.

    Raises:
        ValueError: for another value.
    """
    choice = os.environ.get("GRADAUG_CUDA", "auto")
    if choice not in CUDA_CHOICES:
        raise ValueError(f"GRADAUG_CUDA must be one of {', '.join(CUDA_CHOICES)}, got {choice!r}")
    return choice


def cuda_cpp_kernel(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The C++ CUDA kernel of an operator that has several, None where it was not built."""
    packet = getattr(torch.ops.gradaug, f"{_name(op)}_cuda_cpp", None)
    return packet and packet.default


def backends() -> dict[str, dict[str, str]]:
    """Which backend serves each operator on each device: {"slim_conv2d": {"cpu": "cpp", "cuda": "triton"}, ...}."""
    return {name: dict(served) for name, served in _BACKENDS.items()}


def is_composed(name: str, device: str) -> bool:
    """Whether a composite operator calls others on a device: no kernel took it over."""
    return _BACKENDS.get(name, {}).get(device, "composite") == "composite"


@functools.cache
def build_config() -> dict:
    """What setup.py decided and printed: torch and CUDA versions, flags, targets. Empty where nothing was built.

    "folder" is where the libraries are: beside this file, or, in a clone whose own do not fit, or that has none, where
    the package is installed with libraries of the clone's native sources.
    """
    own = Path(__file__).parent
    installed = [Path(entry, "gradaug_kernels") for entry in sys.path] if _clone_sources() else []
    found = []
    for folder in (own, *installed):
        if (folder / "_build.json").exists():
            found.append({**json.loads((folder / "_build.json").read_text()), "folder": str(folder)})
            if _fits(found[-1]):
                return found[-1]
    return found[0] if found and found[0]["folder"] == str(own) else {}


def load_native() -> None:
    """Import the native libraries that were built. Called once, before the first operator is defined.

    Where none were, or only some, the references serve every operator, and one warning says so.

    Raises:
        ImportError: if they were built against another torch than the one imported, or cannot be loaded.
    """
    config = build_config()
    if config and not config["cpu"]:
        return
    folder = Path(config.get("folder", Path(__file__).parent))
    names = _library_names(config)
    missing = [_library_path(folder, name).name for name in names if not _library_path(folder, name).exists()]
    if not config or missing:
        warnings.warn(
            f"gradaug_kernels runs on its PyTorch references, which are slow: {folder} has no "
            f"{', '.join(missing) or '_build.json'}; run `pip install -e .` in the folder of its sources",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    in_place = _clone_sources() and folder == Path(__file__).parent
    mend = "pip install --no-deps -e ." if in_place else "pip install --no-deps --force-reinstall ."
    if _release(config["torch"]) != _release(torch.__version__):
        raise ImportError(
            f"gradaug_kernels was built against torch {config['torch']}, but torch {torch.__version__} is imported; "
            f"run `{mend}` in the folder of its sources"
        )
    if in_place and config.get("sources") != _clone_sources():
        warnings.warn(
            f"gradaug_kernels' libraries in {folder} are of other sources than csrc/ has now; "
            "run `python setup.py build_ext --inplace`",
            RuntimeWarning,
            stacklevel=2,
        )
    for name in names:
        try:
            _import_library(f"gradaug_kernels.{name}", _library_path(folder, name))
        except ImportError as error:
            raise ImportError(
                f"gradaug_kernels.{name} was built for torch {config['torch']} but cannot be loaded ({error}); "
                f"run `{mend}` in the folder of its sources"
            ) from error


def _fits(config: dict) -> bool:
    """Whether libraries are for this Python and torch and, in a clone, of its sources."""
    if not config["cpu"]:
        return True
    there = all(_library_path(Path(config["folder"]), name).exists() for name in _library_names(config))
    same_sources = _clone_sources() in (None, config.get("sources"))
    return there and same_sources and _release(config["torch"]) == _release(torch.__version__)


def _library_names(config: dict) -> tuple[str, ...]:
    # A CUDA library needs libtorch_cuda, which a CPU build of the same torch release does not have.
    with_cuda = config.get("cuda") and torch.version.cuda and cuda_choice() != "reference"
    return ("_autograd", "_cpu", "_cuda") if with_cuda else ("_autograd", "_cpu")


def _library_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def _release(version: str) -> tuple[str, ...]:
    """What two versions of torch must share for one to load the other's libraries: ("2", "14")."""
    return tuple(version.split(".")[:2])


@functools.cache
def _clone_sources() -> str | None:
    """The digest of the native sources beside the package, None where it is installed without them."""
    csrc = Path(__file__).parent.parent / "csrc"
    return digest(csrc) if (csrc / "module.cpp").exists() else None


def _import_library(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


def _in_cpp(op: torch._ops.OpOverload) -> Callable | None:
    """The operator with its autograd formula in C++ (csrc/autograd.cpp); None where nothing native was built.

    It takes the operator's arguments, and perhaps a buffer for the weight's gradient after them.
    """
    library = sys.modules.get("gradaug_kernels._autograd")
    if library is None:
        return None
    if not hasattr(library, _name(op)):
        raise ImportError(
            f"gradaug_kernels._autograd must have the formula of {_name(op)}, got a build of other sources; "
            "run `pip install .` again in the folder of gradaug_kernels' sources"
        )
    return getattr(library, _name(op))


def _name(op: torch._ops.OpOverload) -> str:
    return op._schema.name.removeprefix("gradaug::")


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gradaug::{name}", key)


load_native()
