"""Whether an installed gradaug_kernels works: `python tools/smoke.py cpp` or `... reference`, what must serve the CPU.

Compares a convolution with PyTorch's, trains a converted ResNet-18 for two steps and the quickstart for one short
epoch. What it imports is the installed package, not the clone that this file lies in.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torchvision

import gradaug_kernels as gk
from gradaug_kernels import _library
from gradaug_kernels.cli.main import main


def losses_and_gradient(x, targets):
    """Of two steps of a ResNet-18."""
    torch.manual_seed(0)
    model = gk.convert(torchvision.models.resnet18(num_classes=10))
    step = gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.01), resolutions=(32, 24))
    losses = [step(x, targets) for _ in range(2)]
    return torch.stack([loss for each in losses for loss in (each.full, *each.subnets)]), model.conv1.weight.grad


def check(expected: str) -> None:
    assert Path(gk.__file__).is_relative_to(sys.prefix), f"imported from {gk.__file__}"
    served = {name: devices["cpu"] for name, devices in _library.backends().items() if devices["cpu"] != "composite"}
    assert set(served.values()) == {expected}, served
    torch.manual_seed(1)
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(12, 16, 3, 3, requires_grad=True)
    y = gk.slim_conv2d(x, weight, None, 12, padding=1)
    y.sum().backward()
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight[:, :8], padding=1))
    assert weight.grad[:, :8].abs().sum() > 0
    assert weight.grad[:, 8:].abs().sum() == 0
    losses, gradient = losses_and_gradient(torch.randn(8, 3, 32, 32), torch.arange(8))
    assert losses.isfinite().all(), losses
    assert gradient.isfinite().all()


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    check(*sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        assert main(["info"]) == 0
        assert main(["train", "quickstart", "--out", f"{folder}/run", "--epochs", "1", "--per-class", "40"]) == 0
    print(f"smoke test passed: Python {sys.version.split()[0]}, torch {torch.__version__}, {sys.argv[1]}")
