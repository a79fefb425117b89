import pytest
import torch

import gradaug_kernels as gk
from gradaug_kernels.models import CifarResNet, build_model
from gradaug_kernels.slim.fuse import fused_chains


def parameters(name, classes, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(name, classes, **options).parameters())


def test_parameters_are_as_published():
    # He et al. 2015, table 6: 0.27 M and 1.7 M; Zagoruyko and Komodakis 2016, table 4: 36.5 M and 11.0 M.
    assert round(parameters("cifar_resnet", 10, depth=20) / 1e6, 2) == 0.27
    assert round(parameters("cifar_resnet", 10, depth=110) / 1e6, 1) == 1.7
    assert round(parameters("wide_resnet", 100, depth=28, widen_factor=10) / 1e6, 1) == 36.5
    assert round(parameters("wide_resnet", 10, depth=16, widen_factor=8) / 1e6, 1) == 11.0
    assert parameters("torchvision/resnet50", 1000) == 25_557_032
    # Yun et al. 2019 (arXiv 1905.04899), table 5: 26.8 M; Han et al. 2017, table 4: 1.7 M, in whole tenths.
    assert round(parameters("pyramidnet", 100) / 1e6, 1) == 26.8
    assert 1.7 <= parameters("pyramidnet", 10, depth=110, alpha=48, bottleneck=False) / 1e6 < 1.8


@pytest.mark.parametrize("size", [32, 28, 24, 33])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet", {"depth": 8, "base_width": 4}),
        ("cifar_resnet", {"depth": 8, "base_width": 4, "stem_stride": 2}),
        ("wide_resnet", {"depth": 10, "widen_factor": 1, "dropout": 0.1}),
        ("pyramidnet", {"depth": 20, "alpha": 12}),
        ("pyramidnet", {"depth": 14, "alpha": 13, "bottleneck": False}),
    ],
)
def test_any_image_size_and_number_of_channels(name, options, size):
    for channels in (1, 3):
        model = build_model(name, 7, channels, **options)
        assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_a_sub_network_is_the_narrower_network():
    wide = CifarResNet(14, num_classes=5, in_channels=1, base_width=8)
    narrow = CifarResNet(14, num_classes=5, in_channels=1, base_width=4)
    state = wide.state_dict()
    for key, value in narrow.state_dict().items():
        value.copy_(state[key][tuple(slice(size) for size in value.shape)])
    x = torch.randn(3, 1, 24, 24)
    gk.convert(wide)
    with gk.use_width(wide, 0.5):
        torch.testing.assert_close(wide(x), narrow(x), rtol=1e-4, atol=1e-5)


def test_every_chain_of_a_cifar_resnet_is_fused():
    chains = fused_chains(gk.convert(CifarResNet(8, base_width=4)))
    assert chains.pop("bn1") == "batch_norm + relu"
    assert len(chains) == 6
    for name, chain in chains.items():
        inner = "batch_norm + relu + convolution"
        assert chain == (inner if name.endswith("bn1") else "batch_norm + add + relu"), name


def test_every_residual_add_of_a_pyramidnet_is_fused():
    chains = fused_chains(gk.convert(build_model("pyramidnet", 10, depth=11, alpha=12)))
    assert [chain for name, chain in chains.items() if name.endswith("bn4")] == ["batch_norm + add"] * 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet", {"depth": 8, "base_width": 4}),
        ("wide_resnet", {"depth": 10, "widen_factor": 2}),
        ("pyramidnet", {"depth": 20, "alpha": 30}),
        ("pyramidnet", {"depth": 8, "alpha": 30, "bottleneck": False}),
    ],
)
def test_converted_networks_train_at_any_width(name, options):
    model = gk.convert(build_model(name, 10, 1, **options))
    for width in (0.25, 0.5, 0.93, 1.0):
        with gk.use_width(model, width):
            model(torch.randn(2, 1, 24, 24)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar-resnet", 10), 'unknown model "cifar-resnet"; the nearest is "cifar_resnet"'),
        (("torchvision/resnet5O", 10), 'the nearest is "torchvision/resnet50"'),
        (("torchvision/resnet18", 10, 1), "must be given images of 3 channels, got 1"),
    ],
)
def test_unknown_or_unfit_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_resnet", {"depth": 18}, r"depth must be 6n \+ 2 .* got 18"),
        ("cifar_resnet", {"base_width": 0}, "base_width must be at least 1, got 0"),
        ("cifar_resnet", {"stem_stride": 0}, "stem_stride must be at least 1, got 0"),
        ("wide_resnet", {"depth": 20}, r"depth must be 6n \+ 4 .* got 20"),
        ("wide_resnet", {"widen_factor": 0}, "widen_factor must be at least 1, got 0"),
        ("pyramidnet", {"depth": 111}, r"depth must be 9n \+ 2 .* got 111"),
        ("pyramidnet", {"depth": 200, "bottleneck": False, "alpha": 0}, "alpha must be at least 1, got 0"),
        ("wide_resnet", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_outside_their_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 10, **options)
