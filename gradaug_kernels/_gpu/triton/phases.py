"""The pixels of one phase of a stride, for the input gradients, dense and depthwise."""

import triton
import triton.language as tl


@triton.jit
def phase_pixels(phase, size, kernel, stride, padding, dilation, tap_step):
    """One axis of an input gradient: the pixels p with (p + padding) % stride == phase, and the taps that reach them.

    Output o reaches input p through tap k where o * stride = p + padding - k * dilation. So only the taps with
    k * dilation % stride == phase matter: every tap_step-th one, tap_step = stride / gcd(stride, dilation). Going
    through pixels in steps of stride and taps in steps of tap_step visits no tap that contributes nothing.

    Returns:
        first pixel, number of pixels, first tap, number of taps, output that the first tap brings to the first pixel.
    """
    first = (phase + stride - padding % stride) % stride
    pixels = (size - first + stride - 1) // stride
    tap = kernel
    for candidate in range(0, tap_step):
        tap = tl.where((candidate * dilation) % stride == phase, candidate, tap)
    taps = tl.maximum(kernel - tap + tap_step - 1, 0) // tap_step
    output = (first + padding - tap * dilation) // stride
    return first, pixels, tap, taps, output
