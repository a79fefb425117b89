"""What is done with state_dicts: averages, files, other models. Weights are NHWC there, and are the model's memory."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradaug_kernels as gk
from gradaug_kernels.slim.state_dict import ChannelsLastWeight
from gradaug_kernels.train.average import WeightAverage

NHWC = torch.channels_last


def original():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def converted(**options):
    return gk.convert(original(), **options)


def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 6, 6)


def change(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    return model


def assert_same(model, other):
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_a_state_dict_is_the_model_s_memory():
    model = converted()
    weight = model.state_dict()["0.weight"]
    assert isinstance(weight, ChannelsLastWeight)
    assert type(model.state_dict(keep_vars=True)["0.weight"]) is nn.Parameter
    assert type(model.state_dict()["3.weight"]) is torch.Tensor, "1x1 kernels are contiguous as they are"
    assert (weight.is_contiguous(), weight.is_contiguous(memory_format=NHWC)) == (False, True)
    assert weight.data_ptr() == model[0].weight.data_ptr()
    assert type(weight + 1) is torch.Tensor
    change(model)
    assert torch.equal(weight, model[0].weight)


AVERAGES = {
    "timm's ModelEmaV3": lambda own, new: torch._foreach_lerp_(own, new, weight=0.25),
    "timm's ModelEmaV2": lambda own, new: [a.copy_(0.75 * a + 0.25 * b) for a, b in zip(own, new, strict=True)],
    "by hand": lambda own, new: [a.mul_(0.75).add_(b.detach(), alpha=0.25) for a, b in zip(own, new, strict=True)],
    "operators": lambda own, new: [_in_place(a, b) for a, b in zip(own, new, strict=True)],
}


def _in_place(a, b):
    a *= 0.75
    a += 0.25 * b


@pytest.mark.parametrize("update", AVERAGES.values(), ids=AVERAGES.keys())
def test_averages_that_write_into_a_state_dict(update):
    average, model = converted(), change(converted())
    expected = [a + 0.25 * (b - a) for a, b in zip(average.parameters(), model.parameters(), strict=True)]
    with torch.no_grad():
        own, new = ([v for v in m.state_dict().values() if v.is_floating_point()] for m in (average, model))
        update(own, new)
    for actual, wanted in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_safetensors_saves_the_state_dict_and_a_loaded_weight_is_nhwc(tmp_path):
    model = converted(widths=(0.5, 1.0))
    state = model.state_dict()
    save_file(state, tmp_path / "before.safetensors")
    change(model)  # the state_dict is the model's memory: a file of it has the weights of when it is written
    for save, source in ((save_file, state), (save_file, {k: v.detach().cpu() for k, v in state.items()})):
        save(source, tmp_path / "model.safetensors")
        loaded = load_file(tmp_path / "model.safetensors")
        assert loaded.keys() == state.keys()
        for name, value in loaded.items():
            assert torch.equal(value, model.state_dict()[name]), name
    save_file(copy.deepcopy(state), tmp_path / "copy.safetensors")
    assert torch.equal(load_file(tmp_path / "copy.safetensors")["0.weight"], model[0].weight)
    save_model(model, tmp_path / "whole.safetensors")
    assert torch.equal(load_file(tmp_path / "whole.safetensors")["0.weight"], model[0].weight)
    for assign in (False, True):
        other = converted(widths=(0.5, 1.0))
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=assign)
        assert_same(other, model)
        assert other[0].weight.is_contiguous(memory_format=NHWC)
        other(images()).square().sum().backward()
        assert other[0].weight.grad.abs().sum() > 0


def test_safetensors_gets_contiguous_bytes_of_a_weight_that_it_moves():
    """As it moves one from a GPU: by `to`, before it asks for its bytes."""
    weight = converted().state_dict()["0.weight"]
    asked = {"__name__": "safetensors.torch", "weight": weight, "torch": torch}
    moved = eval("weight.to(torch.float64)", asked)
    assert type(moved) is torch.Tensor
    assert moved.is_contiguous()
    assert torch.equal(moved, weight.double())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_between_a_model_and_its_conversion(assign):
    model, plain = change(converted()), original()
    plain.load_state_dict(model.state_dict(), assign=assign)
    assert_same(plain, model)
    again = converted()
    again.load_state_dict(plain.state_dict(), assign=assign)
    assert_same(again, model)
    assert again[0].weight.is_contiguous(memory_format=NHWC)
    assert type(again[0].weight) is nn.Parameter
    for other in (plain, again, copy.deepcopy(plain), pickled(plain)):
        assert isinstance(other[0].weight, nn.Parameter)
        other.zero_grad()
        other(images()).square().sum().backward()
        before = other[0].weight.detach().clone()
        torch.optim.SGD(other.parameters(), 0.1).step()
        assert not torch.equal(other[0].weight, before)


def pickled(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(value, dict))


def test_a_plain_state_dict_is_the_original_model_s():
    model = converted(widths=(0.5, 1.0))
    gk.calibrate(model, [0.7], [images()])
    state = gk.plain_state_dict(model)
    assert list(state) == list(original().state_dict())
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in state.values())
    plain = original()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(images()), model.eval()(images()))
    kept = state["0.weight"].clone()
    change(model)
    assert torch.equal(state["0.weight"], kept)


def test_a_state_dict_in_a_file_is_of_plain_tensors():
    model = converted()
    loaded = pickled(model.state_dict())
    assert {type(value) for value in loaded.values()} == {torch.Tensor}
    other = change(converted())
    other.load_state_dict(loaded)
    assert_same(other, model)


def test_functional_call_with_a_state_dict():
    model = converted(widths=(0.5, 1.0)).eval()
    gk.calibrate(model, [0.7], [images()])
    other = {name: value + 1 for name, value in model.state_dict().items()}
    for state in (model.state_dict(), other):
        x = images().requires_grad_()
        y = torch.func.functional_call(model, state, (x,))
        expected = copy.deepcopy(model)
        expected.load_state_dict(state)
        torch.testing.assert_close(y, expected(x))
        assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_made_before_calibration_goes_on(use_buffers):
    model = converted(widths=(0.5, 1.0))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    average.update_parameters(model)
    gk.calibrate(model, [0.5, 0.9], [images()])
    change(model)
    before = copy.deepcopy(average.module.state_dict())
    average.update_parameters(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(average.module.get_parameter(name), (before[name] + parameter.detach()) / 2)
    mean = model[1].running_mean_0_5
    assert mean.abs().sum() > 0
    torch.testing.assert_close(average.module[1].running_mean_0_5, mean / 2 if use_buffers else mean)


def test_our_average_goes_on_after_calibration():
    model = converted(widths=(0.5, 1.0))
    average = WeightAverage(model, 0.5)
    gk.calibrate(model, [0.9], [images()])
    expected = average.model[0].weight.clone()
    average.update(change(model))
    decay = 2 / 11
    torch.testing.assert_close(average.model[0].weight, decay * expected + (1 - decay) * model[0].weight)


def test_calibrated_statistics_go_where_buffers_go():
    model = converted()
    names = [name for name, _ in model.named_buffers()]
    gk.calibrate(model, [0.9], [images()])
    assert [name for name, _ in model.named_buffers()] == names
    assert model.state_dict()["1.running_mean_0_9"].data_ptr() == model[1].running_mean_0_9.data_ptr()
    for other in (copy.deepcopy(model), pickled(model)):
        assert_same(other, model)
    x = images()
    with gk.use_width(model.eval(), 0.9):
        expected = model(x)
    for assign in (False, True):
        other = converted().eval()
        other.load_state_dict(model.state_dict(), assign=assign)
        assert_same(other, model)
        with gk.use_width(other, 0.9):
            assert torch.equal(other(x), expected)
    model.double()
    assert model[1].running_mean_0_9.dtype == torch.double
    assert model[1].num_batches_tracked_0_9.dtype == torch.long
    with gk.use_width(model, 0.9):
        torch.testing.assert_close(model(x.double()), expected.double())
    assert model.to("meta")[1].running_mean_0_9.is_meta


MEAN, VAR, COUNT = (f"1.{name}_0_9" for name in ("running_mean", "running_var", "num_batches_tracked"))
NO_STATISTICS = {
    "no mean": (MEAN, None, r"got no 1\.running_mean_0_9"),
    "no variance": (VAR, None, r"got no 1\.running_var_0_9"),
    "no count": (COUNT, None, r"got no 1\.num_batches_tracked_0_9"),
    "another size": (VAR, torch.ones(7), r"size mismatch for 1\.running_var_0_9"),
    "a list": (MEAN, [0.0] * 8, r"1\.running_mean_0_9 must be a tensor, got list"),
    "a negative variance": (VAR, -torch.ones(8), r"1\.running_var_0_9 must not be negative, got -1"),
    "a negative variance of width 1": ("1.running_var", -torch.ones(8), r"1\.running_var must not be negative, got -1"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("has_the_width", ["no", "as buffers", "calibrated"])
@pytest.mark.parametrize("kind", NO_STATISTICS)
def test_ill_formed_statistics_are_refused(kind, has_the_width, strict):
    model, wrong = converted(widths=(0.9, 1.0) if has_the_width == "as buffers" else (1.0,)), converted()
    if has_the_width == "calibrated":
        gk.calibrate(model, [0.9], [images()])
    gk.calibrate(wrong, [0.9], [images()])
    key, value, message = NO_STATISTICS[kind]
    state = dict(wrong.state_dict())
    del state[key]
    if value is not None:
        state[key] = value
    if (kind, has_the_width) == ("no count", "no"):
        message = r"Unexpected key\(s\)"
        if not strict:  # it is a state_dict without that width
            model.load_state_dict(state, strict=False)
            assert model[1].widths == (1.0,)
            return
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_without_statistics_of_a_width_leave_it_without(assign):
    model, other = converted(widths=(0.5, 1.0)), change(converted())
    gk.calibrate(model, [0.5, 0.9], [images()])
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict({"0.weight": kept["0.weight"]}, strict=False)
    assert model[1].is_calibrated(0.5)
    assert model[1].is_calibrated(0.9)
    model.load_state_dict(other.state_dict(), assign=assign)
    for width in (0.5, 0.9):
        with (
            gk.use_width(model.eval(), width),
            pytest.raises(RuntimeError, match=f"needs the statistics of width {width}"),
        ):
            model(images())
    gk.calibrate(model, [0.9], [images()])
    gk.calibrate(other, [0.9], [images()])
    with gk.use_width(model, 0.9), gk.use_width(other.eval(), 0.9):
        assert torch.equal(model(images()), other(images()))
    model.load_state_dict(kept, assign=assign)
    torch.testing.assert_close(dict(model.state_dict()), dict(kept), rtol=0, atol=0)
    with gk.use_width(model, 0.5):
        model(images())
