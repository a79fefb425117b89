"""Faults of PyTorch's own convolutions that our fallbacks avoid.

The first half is PyTorch alone: a test that fails there says that the fault is mended, and that its workaround can go
(for_torch in csrc/cpu/slim_conv2d.cpp, _for_torch in ops/slim_conv2d.py). The second half is what our operators make of
the same.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import gradaug_kernels  # noqa: F401
from gradaug_kernels.ops.slim_conv2d import slim_conv2d_reference, slim_conv2d_weight_grad__reference

NHWC = torch.channels_last
with_bfloat16_instructions = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512"
    or not torch.cpu._is_avx512_bf16_supported()
    or torch.cpu._is_amx_tile_supported(),
    reason="the faults were found on AVX-512 with bfloat16 and without AMX",
)
MENDED_AT_EARLIEST = "2.16"  # the releases before show what depends on the memory's contents, on some machines
# A forward pass whose left columns of outputs see nothing but padding.
NARROW = """
import torch
x = torch.randn(1, 12, 57, 1).to({dtype}).to(memory_format=torch.channels_last)
weight, bias = torch.randn(12, 3, 1, 1).to({dtype}), torch.randn(12).to({dtype})
for _ in range(20):
    torch.nn.functional.conv2d(x, weight, {bias}, (2, 4), (1, 3), (1, 3), 4)
"""
# One column of outputs with a stride, of groups of one input and two output channels.
ONE_COLUMN = """
import torch
torch.manual_seed(0)
x, weight = (
    torch.randn(size).bfloat16().to(memory_format=torch.channels_last) for size in ((2, 8, 5, 4), (16, 1, 3, 3))
)
exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, (1, 2), (1, 0), 1, 8)
for _ in range(100):
    before = [torch.full((2**i,), torch.nan) for i in range(4, 18)]
    del before
    found = torch.nn.functional.conv2d(x, weight, None, (1, 2), (1, 0), 1, 8)
    assert (found.double() - exact).abs().max() < 0.1
"""
# In a process of its own: the same kernels may also write beyond their memory.
COLUMN = """
import torch
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
geometry = ([2, 2], [1, 1], [1, 1], False, [0, 0], 2, [False, True, False])
for _ in range(100):
    x, dy, weight = (
        torch.randn(size).bfloat16().to(memory_format=torch.channels_last)
        for size in ((2, 6, 175, 1), (2, 6, 88, 1), (6, 3, 3, 3))
    )
    assert torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry)[1].isfinite().all()
"""


# ---- PyTorch alone


def crashed(run):
    return run.returncode < 0


def expect_fault(script, shows):
    """The script shows the fault in one of several processes: what its memory held before decides that."""
    runs = (subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(5))
    if not any(shows(run) for run in runs):
        if torch.__version__ < MENDED_AT_EARLIEST:
            pytest.skip("this machine's memory does not show the fault")
        pytest.fail(f"mended in PyTorch {torch.__version__}")


@with_bfloat16_instructions
@pytest.mark.parametrize(("dtype", "bias"), [("torch.bfloat16", "None"), ("torch.float32", "bias")])
def test_torch_crashes_on_images_narrower_than_the_stride(dtype, bias):
    expect_fault(NARROW.format(dtype=dtype, bias=bias), crashed)


@with_bfloat16_instructions
def test_torch_leaves_memory_uninitialised_in_weight_gradients():
    expect_fault(COLUMN, lambda run: crashed(run) or "AssertionError" in run.stderr)


@with_bfloat16_instructions
def test_torch_adds_what_was_in_memory_to_one_column():
    expect_fault(ONE_COLUMN, lambda run: crashed(run) or "AssertionError" in run.stderr)


def test_torch_trusts_the_stride_of_one_image():
    x, dy, weight, exact = one_image_of_a_batch()
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 2, [False, True, False])
    found = torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry)[1]
    assert not torch.allclose(found, exact), f"mended in PyTorch {torch.__version__}"


def kernel_of_one_row():
    """x, weight of float32, a kernel of one row with another stride there than channels_last gives it; exact y."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 1, 2, generator=generator).contiguous(memory_format=NHWC)
    values = torch.randn(16, 8, 1, 2, generator=generator)
    weight = torch.empty(256).as_strided(values.shape, (16, 1, 8, 8)).copy_(values)
    return x, weight, torch.nn.functional.conv2d(x.double(), values.double(), groups=2)


def test_torch_trusts_the_stride_of_a_kernel_of_one_row():
    x, weight, exact = kernel_of_one_row()
    found = torch.nn.functional.conv2d(x, weight, groups=2)
    assert not torch.allclose(found.double(), exact, atol=0.1), f"mended in PyTorch {torch.__version__}"


# ---- our operators


def test_a_kernel_of_one_row():
    x, weight, exact = kernel_of_one_row()
    arguments = (x, weight, None, 16, [1, 1], [0, 0], [1, 1], 2)
    for convolve in (torch.ops.gradaug.slim_conv2d, slim_conv2d_reference):
        torch.testing.assert_close(convolve(*arguments).double(), exact, rtol=1e-5, atol=1e-5)


def narrow_weight_gradient():
    """x, dy, weight of bfloat16 on 175 x 1 pixels with stride 2, in groups that our kernels leave to PyTorch."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, 175, 1), (2, 6, 88, 1), (6, 3, 3, 3)
    return [torch.randn(s, generator=generator).bfloat16().contiguous(memory_format=NHWC) for s in shapes]


def one_image_of_a_batch():
    """x, dy, weight of float64, x with another batch stride than H * W * C; the exact gradient."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 6, 5, 7, generator=generator, dtype=torch.float64)
    x = values.new_full((300,), torch.nan).as_strided(values.shape, (6, 1, 42, 6)).copy_(values)
    dy = torch.randn(1, 4, 5, 7, generator=generator, dtype=torch.float64).contiguous(memory_format=NHWC)
    weight = torch.zeros(4, 3, 3, 3, dtype=torch.float64).contiguous(memory_format=NHWC)
    return x, dy, weight, torch.nn.grad.conv2d_weight(values, weight.shape, dy.contiguous(), padding=1, groups=2)


FORWARDS = {"operator": torch.ops.gradaug.slim_conv2d.default, "reference": slim_conv2d_reference}
WEIGHT_GRADS = {
    "operator": torch.ops.gradaug.slim_conv2d_weight_grad_.default,
    "reference": slim_conv2d_weight_grad__reference,
}
of_both = pytest.mark.parametrize("kind", FORWARDS)


@of_both
@pytest.mark.parametrize(("width", "padding"), [(2, 1), (4, 0), (4, 1)])
def test_one_column_of_outputs(width, padding, kind):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(size, generator=generator).bfloat16().contiguous(memory_format=NHWC)
        for size in ((2, 8, 5, width), (16, 1, 3, 3 + 2 * (padding and width == 4)))
    )
    geometry = ([1, 2], [1, padding], [1, 1], 8)
    exact = F.conv2d(x.double(), weight.double(), None, *geometry)
    assert exact.shape[3] == 1
    for _ in range(20):
        before = [torch.full((2**i,), torch.nan) for i in range(4, 18)]
        del before
        y = FORWARDS[kind](x, weight, None, 16, *geometry)
        torch.testing.assert_close(y, exact.to(y.dtype))


@of_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_images_narrower_than_the_stride(dtype, kind):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((1, 12, 57, 1), (12, 3, 1, 1)))
    bias, geometry = torch.randn(12, generator=generator).to(dtype), ([2, 4], [1, 3], [1, 3], 4)
    y = FORWARDS[kind](x.contiguous(memory_format=NHWC), weight, bias, 12, *geometry)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype))


@of_both
def test_weight_gradient_of_a_column_of_pixels(kind):
    x, dy, weight = narrow_weight_gradient()
    buffer = torch.zeros(weight.shape)
    WEIGHT_GRADS[kind](dy, x, buffer, [2, 2], [1, 1], [1, 1], 2)
    exact = torch.nn.grad.conv2d_weight(x.double().contiguous(), weight.shape, dy.double().contiguous(), 2, 1, 1, 2)
    torch.testing.assert_close(buffer.double(), exact, rtol=1e-5, atol=1e-5)


@of_both
@pytest.mark.parametrize("kernel", [1, 3])
def test_weight_gradient_of_one_image_of_a_batch(kernel, kind):
    x, dy, _, _ = one_image_of_a_batch()
    buffer = torch.zeros(4, 3, kernel, kernel, dtype=torch.float64)
    WEIGHT_GRADS[kind](dy, x, buffer, [1, 1], [kernel // 2] * 2, [1, 1], 2)
    exact = torch.nn.grad.conv2d_weight(x.clone().contiguous(), buffer.shape, dy.contiguous(), 1, kernel // 2, 1, 2)
    torch.testing.assert_close(buffer, exact)


@of_both
def test_weight_gradient_of_one_row_of_a_larger_image(kind):
    x = torch.randn(1, 6, 3, 8, dtype=torch.float64).contiguous(memory_format=NHWC)[:, :, 1:2]
    dy, buffer = torch.randn(1, 4, 1, 8, dtype=torch.float64), torch.zeros(4, 3, 3, 3, dtype=torch.float64)
    WEIGHT_GRADS[kind](dy.contiguous(memory_format=NHWC), x, buffer, [1, 1], [1, 1], [1, 1], 2)
    exact = torch.nn.grad.conv2d_weight(x.clone().contiguous(), buffer.shape, dy, padding=1, groups=2)
    torch.testing.assert_close(buffer, exact)


@of_both
def test_gradient_of_one_row_narrower_than_the_stride(kind):
    x = torch.empty_strided((1, 4, 1, 2), (8, 1, 4, 4)).copy_(torch.randn(1, 4, 1, 2))  # NHWC has rows 8 apart
    dy = torch.empty_strided((1, 2, 1, 1), (2, 1, 2, 2)).copy_(torch.randn(1, 2, 1, 1))
    buffer = torch.zeros(2, 2, 1, 1)
    WEIGHT_GRADS[kind](dy, x, buffer, [1, 3], [0, 0], [1, 1], 2)
    torch.testing.assert_close(buffer[:, :, 0, 0], dy[0, :, :, 0] * x[0, :, 0, 0].view(2, 2))
