"""The layers: drop-ins at width 1, slices below it, private statistics, and the sentences for bad input."""

import copy

import pytest
import torch
from torch import nn

import gradaug_kernels as gk

CONVOLUTIONS = {
    "plain": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1, bias=False),
    "rectangular": dict(kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "same": dict(kernel_size=3, padding="same", dilation=2),
    "same, even kernel": dict(kernel_size=(2, 4), padding="same"),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=3, padding=2, padding_mode="reflect"),
    "circular, same": dict(kernel_size=3, padding="same", padding_mode="circular"),
    "replicate": dict(kernel_size=(3, 5), padding=(1, 2), padding_mode="replicate"),
    "grouped": dict(kernel_size=3, padding=1, groups=4),
    "depthwise": dict(kernel_size=3, padding=1, groups=8),
}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def run(module, x):
    """Output, input gradient and parameter gradients."""
    x = x.clone().requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    return y.detach(), *gradients


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_conv_is_a_drop_in_at_width_1(options):
    reference = nn.Conv2d(8, 12 if options.get("groups") != 8 else 16, dtype=torch.double, **options)
    conv = gk.FastSlimConv2d(8, reference.out_channels, dtype=torch.double, **options)
    conv.load_state_dict(reference.state_dict())
    assert list(conv.state_dict()) == list(reference.state_dict())
    x = torch.randn(2, 8, 7, 9, dtype=torch.double)
    for actual, expected in zip(run(conv, x), run(reference, x), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("width", [0.25, 0.5, 0.8])
def test_conv_below_width_1_is_the_slice(options, width):
    groups = options.get("groups", 1)
    conv = gk.FastSlimConv2d(8, 16, dtype=torch.double, **options)
    channels = 8 if groups == 1 else max(1, round(groups * width)) * (8 // groups)
    active = 1 if groups == 1 else channels * groups // 8
    out = gk.round_channels(16, width) if groups == 1 else active * 16 // groups
    x = torch.randn(2, channels, 7, 9, dtype=torch.double)

    reference = nn.Conv2d(channels, out, dtype=torch.double, **{**options, "groups": active})
    with torch.no_grad():
        reference.weight.copy_(conv.weight[:out, : channels // active])
        if conv.bias is not None:
            reference.bias.copy_(conv.bias[:out])
    with gk.use_width(conv, width):
        y, dx, dweight, *dbias = run(conv, x)
    expected = run(reference, x)
    assert_close(y, expected[0])
    assert_close(dx, expected[1])
    assert_close(dweight[:out, : channels // active], expected[2])
    assert dweight.shape == conv.weight.shape
    assert dweight[out:].abs().sum() == 0
    assert dweight[:, channels // active :].abs().sum() == 0
    for db in dbias:
        assert_close(db[:out], expected[3])
        assert db[out:].abs().sum() == 0


def test_conv_weight_and_output_are_channels_last():
    conv = gk.FastSlimConv2d(4, 8, 3)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv(torch.randn(2, 4, 8, 8)).is_contiguous(memory_format=torch.channels_last)


def test_linear_is_a_drop_in_and_slices():
    reference = nn.Linear(10, 6, dtype=torch.double)
    linear = gk.SlimLinear(10, 6, dtype=torch.double)
    linear.load_state_dict(reference.state_dict())
    x = torch.randn(3, 5, 10, dtype=torch.double)
    for actual, expected in zip(run(linear, x), run(reference, x), strict=True):
        assert_close(actual, expected)
    with gk.use_width(linear, 0.5):
        assert_close(linear(x[..., :4]), x[..., :4] @ linear.weight[:, :4].T + linear.bias)
    hidden = gk.SlimLinear(10, 6, slim_out=True, dtype=torch.double)
    with gk.use_width(hidden, 0.5):
        assert_close(hidden(x[..., :4]), x[..., :4] @ hidden.weight[:3, :4].T + hidden.bias[:3])


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_batch_norm_is_a_drop_in_at_width_1(options):
    reference = nn.BatchNorm2d(6, dtype=torch.double, **options)
    norm = gk.SlimBatchNorm2d(6, dtype=torch.double, **options)
    if reference.affine:
        nn.init.normal_(reference.weight)
        nn.init.normal_(reference.bias)
    norm.load_state_dict(reference.state_dict())
    assert list(norm.state_dict()) == list(reference.state_dict())
    for _ in range(3):
        x = torch.randn(4, 6, 3, 5, dtype=torch.double) * 3 + 1
        for actual, expected in zip(run(norm, x), run(reference, x), strict=True):
            assert_close(actual, expected)
    for name, buffer in reference.named_buffers():
        assert_close(norm.get_buffer(name), buffer)
    norm.eval(), reference.eval()
    for actual, expected in zip(run(norm, x), run(reference, x), strict=True):
        assert_close(actual, expected)


def test_batch_norm_adds_residual_and_applies_relu():
    norm = gk.SlimBatchNorm2d(6, dtype=torch.double)
    x, residual = torch.randn(2, 4, 6, 3, 3, dtype=torch.double)
    assert_close(norm(x, residual, relu=True), (norm(x) + residual).relu())


def test_listed_widths_have_private_statistics_and_others_store_nothing():
    norm = gk.SlimBatchNorm2d(10, widths=(0.5, 1.0), momentum=1.0, dtype=torch.double)
    assert norm.widths == (0.5, 1.0)
    x = torch.randn(4, 10, 3, 3, dtype=torch.double) + 5
    before = copy.deepcopy(norm.state_dict())
    with gk.use_width(norm, 0.7):
        norm(x[:, :7])
    for name, value in before.items():
        assert torch.equal(norm.state_dict()[name], value), name
    with gk.use_width(norm, 0.5):
        norm(x[:, :5])
    assert_close(norm.running_mean_0_5[:5], x[:, :5].mean((0, 2, 3)))
    assert_close(norm.running_var_0_5[:5], x[:, :5].var((0, 2, 3)))
    assert norm.num_batches_tracked_0_5 == 1
    assert torch.equal(norm.running_mean_0_5[5:], before["running_mean_0_5"][5:])
    assert torch.equal(norm.running_mean, before["running_mean"])
    assert norm.num_batches_tracked == 0


def test_evaluation_of_an_uncalibrated_width():
    norm = gk.SlimBatchNorm2d(10, widths=(0.5, 1.0)).eval()
    x = torch.randn(4, 5, 3, 3)
    for width, channels in ((0.5, 5), (0.7, 7)):
        with (
            gk.use_width(norm, width),
            pytest.raises(RuntimeError, match=rf"statistics of width {width}, got those of widths 1; .*calibrate"),
        ):
            norm(torch.randn(4, channels, 3, 3))
    norm.train()
    with gk.use_width(norm, 0.5):
        norm(x)
        norm.eval()(x)


def test_state_dict_carries_private_statistics():
    norm = gk.SlimBatchNorm2d(10, widths=(0.5,))
    with gk.use_width(norm, 0.5):
        norm(torch.randn(4, 5, 3, 3))
    other = gk.SlimBatchNorm2d(10)
    other.load_state_dict(norm.state_dict())
    assert other.widths == (0.5, 1.0)
    x = torch.randn(2, 5, 3, 3)
    with gk.use_width(norm, 0.5), gk.use_width(other, 0.5):
        assert torch.equal(other.eval()(x), norm.eval()(x))
    # One that was never calibrated stays so, and nn.BatchNorm2d's state_dict loads.
    other.load_state_dict(gk.SlimBatchNorm2d(10, widths=(0.5,)).state_dict())
    with gk.use_width(other, 0.5), pytest.raises(RuntimeError, match="calibrate"):
        other(x)
    other.load_state_dict(nn.BatchNorm2d(10).state_dict())


def test_calibrate_is_the_cumulative_average():
    torch.manual_seed(0)
    model = nn.Sequential(gk.FastSlimConv2d(3, 8, 3), gk.SlimBatchNorm2d(8), nn.Dropout(0.5)).double()
    batches = [(torch.randn(4, 3, 6, 6, dtype=torch.double), None) for _ in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[2].eval()
    gk.calibrate(model, [0.5, 0.77], batches, num_batches=2)
    assert (model.training, model[1].training, model[2].training, model[1].momentum) == (True, True, False, 0.1)
    with gk.use_width(model, 0.5):
        outputs = [model[0](images) for images, _ in batches[:2]]
    assert_close(model[1].running_mean_0_5[:4], torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    assert_close(model[1].running_var_0_5[:4], torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    model.eval()
    with gk.use_width(model, 0.77):
        assert model(batches[2][0]).shape == (4, 6, 4, 4)


def test_calibrate_refuses_bad_settings():
    model = nn.Sequential(gk.FastSlimConv2d(3, 8, 3), gk.SlimBatchNorm2d(8))
    with pytest.raises(ValueError, match="at least one batch per width, got none"):
        gk.calibrate(model, [0.5], [])
    with pytest.raises(ValueError, match="num_batches must be at least 1, got 0"):
        gk.calibrate(model, [0.5], [torch.randn(2, 3, 8, 8)], num_batches=0)
    with pytest.raises(ValueError, match=r"width must be in \(0, 1\], got 2"):
        gk.calibrate(model, [2], [torch.randn(2, 3, 8, 8)])


@pytest.mark.parametrize("num_batches", [1.5, "2"])
def test_calibrate_takes_a_whole_number_of_batches(num_batches):
    model = nn.Sequential(gk.FastSlimConv2d(3, 8, 3), gk.SlimBatchNorm2d(8))
    with pytest.raises(ValueError, match=f"num_batches must be a whole number, got {num_batches!r}"):
        gk.calibrate(model, [0.5], [torch.randn(2, 3, 8, 8)], num_batches=num_batches)


def network():
    torch.manual_seed(0)
    return gk.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)))


def batches(count=2):
    torch.manual_seed(1)
    return [torch.randn(4, 3, 6, 6) for _ in range(count)]


def train(model, *, lr=0.1, steps=2, width=1.0):
    """Some steps of width 1, or of another."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for images in batches(steps):
        with gk.use_width(model.train(), width):
            optimizer.zero_grad()
            model(images).square().mean().backward()
        optimizer.step()


def evaluate(model, width):
    with gk.use_width(model.eval(), width), torch.no_grad():
        return model(batches()[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_calibration_that_is_interrupted_changes_nothing(error):
    def interrupted():
        yield batches()[0]
        raise error

    model = network()
    train(model)
    gk.calibrate(model, [0.5], batches())
    before = copy.deepcopy(model.state_dict())
    for widths in ([1.0], [0.5], [0.7, 1.0, 0.5]):
        with pytest.raises(error):
            gk.calibrate(model, widths, interrupted())
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model[1].widths == (0.5, 1.0)
    evaluate(model, 0.5)
    with pytest.raises(RuntimeError, match=r"got those of widths 0\.5, 1;"):
        evaluate(model, 0.7)


def test_copied_statistics_are_those_of_the_weights_copied_with_them():
    """As averages and broadcasts of a state_dict write them, value by value."""
    torch.manual_seed(0)
    norm = gk.SlimBatchNorm2d(4, widths=(0.5,))
    peer, images = copy.deepcopy(norm), torch.randn(4, 4, 3, 3)
    for one in (norm, peer):
        gk.calibrate(one, [0.5], [(images[:, :2], None)])
    norm.train()(images)
    with torch.no_grad():
        norm.weight.mul_(2)
    gk.calibrate(norm, [0.5], [(images[:, :2] + 1, None)])
    with torch.no_grad():
        for copied, value in zip(peer.state_dict().values(), norm.state_dict().values(), strict=True):
            copied.copy_(value)
    gk.set_width(peer.eval(), 0.5)
    gk.set_width(norm.eval(), 0.5)
    assert torch.equal(peer(images[:, :2]), norm(images[:, :2]))


def test_calibration_in_inference_mode_leaves_ordinary_tensors():
    model = network()
    with torch.inference_mode():
        gk.calibrate(model, [0.5], batches())
    assert not any(value.is_inference() for value in model.state_dict().values())
    train(model)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    gk.calibrate(model, [0.5], batches())
    evaluate(model, 0.5)


def loaded(model):
    other = network()
    other.load_state_dict(model.state_dict())
    return other


def unmoved(model):
    return model


@pytest.mark.parametrize(
    ("before_training", "after_training"),
    [(unmoved, unmoved), (loaded, unmoved)]
    + [
        pair for moved in (copy.deepcopy, lambda m: m.double().float()) for pair in ((moved, unmoved), (unmoved, moved))
    ],
)
def test_statistics_from_before_training_went_on_are_refused(before_training, after_training):
    model = network()
    gk.calibrate(model, [0.5, 0.7], batches())
    expected = evaluate(model, 0.5)
    model = before_training(model)
    assert torch.equal(evaluate(model, 0.5), expected)
    train(model)
    model = after_training(model)
    for width in (0.5, 0.7):
        with pytest.raises(RuntimeError, match=rf"width {width}, got ones from before the network was trained on; "):
            evaluate(model, width)
    gk.calibrate(model, [0.5], batches())
    evaluate(model, 0.5)
    with pytest.raises(RuntimeError, match=r"width 0\.7, got ones from before"):
        evaluate(model, 0.7)


def without_a_change_of_weights(model):
    train(model, lr=0.0)


def of_another_value(model):
    with torch.no_grad():
        model[1].weight.add_(1)


def frozen(model):
    model[1].weight.requires_grad_(False)
    train(model)


def at_that_width(model):
    train(model, width=0.5)


def with_all_statistics(model):
    train(model)
    gk.calibrate(model, [0.5, 1.0], batches())


@pytest.mark.parametrize(
    "change", [without_a_change_of_weights, of_another_value, frozen, at_that_width, with_all_statistics]
)
def test_statistics_that_are_not_refused(change):
    """Those of the present weights, those that training updates, and those of which a norm cannot tell."""
    model = network()
    gk.calibrate(model, [0.5], batches())
    change(model)
    evaluate(model, 0.5)


def test_an_average_of_weights_is_calibrated_by_itself():
    model = network()
    gk.calibrate(model, [0.5], batches())
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(2):
        train(model)
        average.update_parameters(model)
    with pytest.raises(RuntimeError, match=r"width 0\.5, got ones from before"):
        evaluate(average, 0.5)
    gk.calibrate(average, [0.5], batches())
    evaluate(average, 0.5)


def test_update_bn_is_of_the_present_width():
    model = network()
    train(model)
    model[1].add_width(0.5)
    full, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    gk.calibrate(expected, [0.5], batches())
    with gk.use_width(model, 0.5):
        torch.optim.swa_utils.update_bn(batches(), model)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    with gk.use_width(model, 0.7), pytest.raises(ValueError, match=r"width must be one of 0\.5, 1, got 0\.7"):
        torch.optim.swa_utils.update_bn(batches(), model)
    assert torch.equal(model[1].running_mean, full["1.running_mean"])
    torch.optim.swa_utils.update_bn(batches(), model)
    assert not torch.equal(model[1].running_mean, full["1.running_mean"])
    assert torch.equal(model[1].running_mean_0_5, expected[1].running_mean_0_5)
    model[1].reset_parameters()
    assert not model[1].is_calibrated(0.5)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("divisors", [(8, 1), (1, 8)])
def test_statistics_of_another_divisor_are_refused(divisors):
    def network(divisor):
        return gk.convert(nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)), divisor=divisor)

    saved, model = map(network, divisors)
    gk.calibrate(saved, [0.6], batches())
    model.load_state_dict(saved.state_dict())
    channels = [gk.round_channels(16, 0.6, divisor) for divisor in divisors]
    message = f"statistics of width 0.6 must be of {channels[1]} channels, got loaded ones of {channels[0]}, "
    with pytest.raises(RuntimeError, match=message):
        evaluate(model, 0.6)
    same = network(divisors[0])
    same.load_state_dict(saved.state_dict())
    assert torch.equal(evaluate(same, 0.6), evaluate(saved, 0.6))
    assert same[1]._written == {}
    gk.calibrate(model, [0.6], batches())
    evaluate(model, 0.6)
    state = saved.state_dict()
    for name in ("running_mean", "running_var"):
        state[f"1.{name}_0_6"] = state[f"1.{name}"]
    model.load_state_dict(state)
    evaluate(model, 0.6)  # copies of the statistics of width 1 are of all channels on purpose


@pytest.mark.parametrize(
    ("layer", "shape", "width", "message"),
    [
        (gk.FastSlimConv2d(8, 8, 1), (1, 4, 2, 2), 1.0, "must have 8 channels at width 1, got 4"),
        (gk.FastSlimConv2d(8, 8, 1), (1, 9, 2, 2), 0.5, "x must have between 1 and 8 channels .*, got 9"),
        (gk.FastSlimConv2d(8, 8, 1), (2, 2), 1.0, r"must be \[N, C, H, W\] or \[C, H, W\], got shape \(2, 2\)"),
        (gk.FastSlimConv2d(8, 8, 1), (7, 2, 2), 1.0, "must have 8 channels at width 1, got 7"),
        (gk.SlimBatchNorm2d(8), (8, 2, 2), 1.0, r"must be \[N, C, H, W\], got shape \(8, 2, 2\)"),
        (gk.SlimBatchNorm2d(8, eps=0.0), (2, 8, 2, 2), 1.0, "eps must be positive, got 0.0"),
        (gk.SlimLinear(8, 8), (), 1.0, r"input must be \[..., F\], got a number"),
        (gk.FastSlimConv2d(8, 8, 1, groups=2), (1, 6, 2, 2), 0.7, "multiple of 4 channels .*got 6; .*divisor=4"),
        (gk.SlimBatchNorm2d(8), (2, 4, 2, 2), 1.0, "must have 8 channels at width 1, got 4"),
        (gk.SlimBatchNorm2d(8), (2, 9, 2, 2), 0.5, "must have at most 8 channels at width 0.5, got 9"),
        (gk.SlimBatchNorm2d(8), (1, 8, 1, 1), 1.0, "more than 1 value per channel .*got input of shape"),
        (gk.SlimLinear(8, 8), (2, 4), 1.0, "must have 8 features at width 1, got 4"),
        (gk.SlimLinear(8, 8), (2, 9), 0.5, "x must have between 1 and 8 features, got 9"),
    ],
)
def test_wrong_channel_counts(layer, shape, width, message):
    with gk.use_width(layer, width), pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))


def test_integer_images():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"must be a floating-point tensor, got torch.uint8"):
        gk.FastSlimConv2d(3, 8, 3)(images)


def test_shapes_on_the_meta_device():
    model = nn.Sequential(gk.FastSlimConv2d(3, 8, 3), gk.SlimBatchNorm2d(8), nn.Flatten(), gk.SlimLinear(8 * 36, 5))
    with gk.use_width(model.to("meta"), 0.5):
        assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_layers_copy_and_pickle(tmp_path):
    model = nn.Sequential(gk.FastSlimConv2d(3, 8, 3), gk.SlimBatchNorm2d(8, widths=(0.5,)))
    torch.save(copy.deepcopy(model), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 3, 8, 8)
    with gk.use_width(model, 0.5), gk.use_width(loaded, 0.5):
        assert torch.equal(loaded(x), model(x))
