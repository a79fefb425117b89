"""An oracle for sub-networks that knows nothing of slices: the original network with all other channels set to zero."""

import copy
from contextlib import ExitStack

import torch
from torch import nn

import gradaug_kernels as gk

LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Affine parameters and statistics away from 0 and 1; the network in float64 and evaluation."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        if tensor is not None:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            uniform(module.weight, 0.5, 1)
            uniform(module.bias, -0.2, 0.2)
            uniform(module.running_mean, -0.1, 0.1)
            uniform(module.running_var, 0.5, 1.5)
    return model.double().eval()


def converted(model: nn.Module, width: float, **options) -> nn.Module:
    """A converted copy, whose statistics at `width` are those of the full network."""
    result = gk.convert(copy.deepcopy(model), widths=(width, 1.0), **options)
    state = result.state_dict()
    suffix = "_" + repr(float(width)).replace(".", "_")
    for name in [name for name in state if name.endswith(suffix)]:
        state[name] = state[name.removesuffix(suffix)] + ("num_batches" in name)
    result.load_state_dict(state)
    return result


def axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else -3


def first(x, count: int, dim: int):
    """x with zeros in place of all but its first `count` elements along dim."""
    rest = torch.arange(x.shape[dim], device=x.device) < count
    return x * rest.reshape(-1, *[1] * (-1 - dim))


def relative_error(model: nn.Module, sliced: nn.Module, inputs: tuple, width: float) -> float:
    """Between the outputs of the sub-network and of the original whose layers read and make only its channels."""
    names = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    numbers: dict[str, list] = {name: [] for name in names}  # channels that each call reads and makes
    with ExitStack() as stack, torch.no_grad(), gk.use_width(sliced, width):
        for name in names:
            dim = axis(names[name])

            def note(module, args, y, found=numbers[name], dim=dim):
                found.append((args[0].shape[dim], y.shape[dim]))

            stack.callback(sliced.get_submodule(name).register_forward_hook(note).remove)
        actual = sliced(*inputs)
    with ExitStack() as stack, torch.no_grad():
        for name, module in names.items():
            calls, dim = iter(numbers[name]), axis(module)

            def mask(module, args, calls=calls, dim=dim):
                module._made = next(calls)
                return (first(args[0], module._made[0], dim), *args[1:])

            def mask_output(module, args, y, dim=dim):
                return first(y, module._made[1], dim)

            stack.callback(module.register_forward_pre_hook(mask).remove)
            stack.callback(module.register_forward_hook(mask_output).remove)
        expected = model(*inputs)
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    assert pairs
    assert all(a.shape == b.shape for a, b in pairs)
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def tensors(outputs) -> list:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def is_narrow(sliced: nn.Module, width: float) -> bool:
    """Whether anything of it is sliced at that width."""
    with gk.use_width(sliced, width):
        layers = [m for m in sliced.modules() if isinstance(m, gk.FastSlimConv2d | gk.SlimLinear)]
        return any(m._out.shape[0] < m.weight.shape[0] for m in layers)
