"""What GradAug is combined and compared with: inside the network, on the batch, at the optimizer's step."""

import copy
import json

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import DropBlock2d, StochasticDepth

import gradaug_kernels as gk
from gradaug_kernels.cli.main import main
from gradaug_kernels.models import CifarResNet, PyramidNet, WideResNet
from gradaug_kernels.models.regularize import regularise
from gradaug_kernels.recipes.config import RegularizeConfig
from gradaug_kernels.slim.channel_classes import channel_classes
from gradaug_kernels.train import run
from gradaug_kernels.train.augment import BatchAugmentation
from gradaug_kernels.train.average import WeightAverage, add_gradient_noise

NETWORKS = {
    "cifar_resnet": lambda: CifarResNet(14, base_width=4),
    "wide_resnet": lambda: WideResNet(16, 1),
    "pyramidnet": lambda: PyramidNet(20, 12),
    "pyramidnet-basic": lambda: PyramidNet(14, 12, bottleneck=False),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
}


# ---- inside the network


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_is_that_of_the_plain_network(name):
    torch.manual_seed(0)
    plain = NETWORKS[name]().eval()
    options = {"dropout": 0.5, "drop_block": 0.3, "drop_block_size": 3, "stochastic_depth": 0.5}
    model = gk.convert(regularise(copy.deepcopy(plain), **options)).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert channel_classes(model), "the network is traced as before"
    model.train()
    for width in (1.0, 0.5):
        with gk.use_width(model, width):
            model(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", NETWORKS)
def test_stochastic_depth_grows_linearly_and_stands_before_the_addition(name):
    """With every branch left out, the network is its shortcuts: those of random depth without any block."""
    model = NETWORKS[name]()
    blocks = sum(hasattr(module, "skipped") for module in model.modules()) or {"resnet18": 8, "resnet50": 16}[name]
    regularise(model, stochastic_depth=0.6)
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    assert [layer.p for layer in layers] == pytest.approx([0.6 * (i + 1) / blocks for i in range(blocks)])
    if not name.startswith("resnet"):
        for layer in layers:
            layer.p = 1.0
        x = torch.randn(2, 3, 16, 16)
        dropped = model.train()(x)
        for block in (module for module in model.modules() if hasattr(module, "skipped")):
            block.skipped = True
        torch.testing.assert_close(dropped, model(x))


def test_drop_block_is_in_the_last_two_stages():
    model = regularise(CifarResNet(14, base_width=4), drop_block=0.1, drop_block_size=5)
    names = [name for name, module in model.named_modules() if isinstance(module, DropBlock2d)]
    assert names == [f"layer{stage}.{block}.bn2.1" for stage in (2, 3) for block in (0, 1)]
    assert model.layer3[1].bn2[1].block_size == 5


def test_networks_without_known_parts():
    with pytest.raises(ValueError, match="need a model of known residual blocks, got Sequential"):
        regularise(nn.Sequential(nn.Linear(2, 2)), stochastic_depth=0.1)
    with pytest.raises(ValueError, match="dropout needs a model with a linear classifier fc, got VGG"):
        regularise(torchvision.models.vgg11(), dropout=0.1)


# ---- on the batch


def batch():
    torch.manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16).contiguous()
    return images, torch.tensor([0, 1, 2, 3])


def test_no_augmentation_is_the_batch_itself():
    images, targets = batch()
    augmented, same = BatchAugmentation(RegularizeConfig(), 5)(images, targets)
    assert torch.equal(augmented, images)
    assert same is targets


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(name):
    augmentation = BatchAugmentation(RegularizeConfig(**{name: 1.0}), 5)
    for _ in range(5):
        images, targets = augmentation(*batch())
        assert targets.shape == (4, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(images.mean((1, 2, 3)), targets @ torch.arange(5.0), rtol=1e-4, atol=1e-4)
        values = {"mixup": [1] * 4, "cutmix": [2] * 4}[name]
        assert all(len(image.unique()) <= most for image, most in zip(images, values, strict=True))


def test_mix_probability():
    augmentation = BatchAugmentation(RegularizeConfig(cutmix=1.0, mix_probability=0.25), 5)
    images, targets = batch()
    torch.manual_seed(1)
    mixed = sum(augmentation(images, targets)[1].ndim == 2 for _ in range(400))
    assert 65 <= mixed <= 135  # 100 expected, 4 standard deviations


def test_each_image_is_erased_on_its_own():
    images, targets = batch()
    erased, same = BatchAugmentation(RegularizeConfig(random_erasing=1.0), 5)(images + 1, targets)
    assert same is targets
    zeros = [(image == 0) for image in erased]
    assert all(0 < zero.sum() < zero.numel() for zero in zeros)
    assert len({tuple(zero.flatten().tolist()) for zero in zeros}) > 1


# ---- at the optimizer's step


def test_average_of_weights():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.5)
    expected = 1.0
    for update in range(1, 8):
        model.weight.data.fill_(float(update))
        average.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        assert average.model.weight.item() == pytest.approx(expected)
    assert not average.model.weight.requires_grad


def test_average_of_a_converted_network():
    model = gk.convert(CifarResNet(8, base_width=4))
    average = WeightAverage(model, 0.0)
    model(torch.randn(4, 3, 8, 8))
    average.update(model)
    for name, value in model.state_dict().items():
        assert torch.equal(average.model.state_dict()[name], value), name


def test_gradient_noise_falls_with_time():
    weight = nn.Parameter(torch.zeros(200_000))
    optimizer = torch.optim.SGD([weight], 1.0)
    time = 0
    add_gradient_noise(optimizer, 0.04, lambda: time)
    torch.manual_seed(0)
    for time in (0, 99):
        weight.data.zero_()
        weight.grad = torch.full_like(weight, 3.0)
        optimizer.step()
        assert -weight.mean().item() == pytest.approx(3.0, abs=0.002)
        assert weight.std().item() == pytest.approx(0.2 / (1 + time) ** 0.275, rel=0.01)


# ---- all of it in a run


def test_a_run_with_everything_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "write_curves", lambda *arguments: None)
    settings = (
        *("model.depth=8", "model.base_width=4", "train.batch_size=25", "gradaug.num_subnets=1", "train.device=cpu"),
        *("regularize.label_smoothing=0.1", "regularize.mixup=0.2", "regularize.cutmix=1.0"),
        *("regularize.random_erasing=0.5", "regularize.dropout=0.1", "regularize.drop_block=0.1"),
        *("regularize.drop_block_size=3", "regularize.stochastic_depth=0.2", "regularize.gradient_noise=0.01"),
        *("regularize.average_decay=0.9", "evaluate.calibration_batches=1", 'gradaug.transforms=["trivial_augment"]'),
    )
    command = ["train", "quickstart", "--per-class", "10", "--epochs", "2"]
    command += [word for setting in settings for word in ("--set", setting)]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0

    calls, original = [], gk.GradAug.__call__

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 6:  # in the second epoch of four steps
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gk.GradAug, "__call__", stopped)
        assert main([*command, "--out", str(tmp_path / "stopped")]) == 130
    assert main([*command, "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped")]
    for kind in ("model", "average"):
        for name, value in states[0][kind].items():
            assert torch.equal(states[1][kind][name], value), (kind, name)
    assert any(not torch.equal(states[0]["model"][k], v) for k, v in states[0]["average"].items() if "weight" in k)

    # The average is what was evaluated, and what `gradaug eval` loads.
    evaluation = ["eval", str(tmp_path / "whole"), "--parts", "calibration", "--out", str(tmp_path / "e")]
    assert main(evaluation) == 0
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["top1"] == pytest.approx(summary["top1"])
    capsys.readouterr()
