"""What every launcher needs: vector widths, strides in vectors, tiles, and the launch itself.

Rule for every kernel of this package: sizes, strides and channel counts are run-time arguments that Triton does not
specialise on, so a new width never compiles anything. What the compiler must know of them, how many elements one load
may take, is the explicit constant VEC: 16 bytes, 4 bytes or one element. Strides and channel counts are passed divided
by VEC and multiplied again in the kernel, which tells the compiler their divisibility.
"""

from torch import Tensor

from ...ops._conv import output_size

MULTIPROCESSORS = 128  # a round figure between an A100's 108 and an H100's 132: enough programs to fill either


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Run a kernel on the current stream of the current device."""
    kernel[grid](**arguments)


def vector_width(tensors: tuple[Tensor, ...], *counts: int) -> int:
    """How many elements one load may take: as many as divide every channel count and every stride of the tensors.

    Args:
        tensors: of one dtype, read or written along dimension 1.
        counts: channel counts, at which a kernel masks.
    """
    size = tensors[0].element_size()
    numbers = [*counts]
    for tensor in tensors:
        numbers += [tensor.stride(d) for d in (0, 2, 3) if tensor.shape[d] > 1]
    for width in (16 // size, 4 // size):
        if all(number % width == 0 for number in numbers) and all(t.data_ptr() % 16 == 0 for t in tensors):
            return width
    return 1


def strides(tensor: Tensor, vec: int, *names: str) -> dict[str, int]:
    """The strides of dimensions 0, 2 and 3 in vectors, under the kernel's names for them."""
    # A dimension of size 1 may have any stride, which the kernel multiplies by 0.
    found = [tensor.stride(d) if tensor.shape[d] > 1 else 0 for d in (0, 2, 3)]
    return {name: stride // vec for name, stride in zip(names, found, strict=True)}


def axes(stride, padding, dilation) -> dict[str, int]:
    """stride_h, stride_w, padding_h, ..., as every convolution's kernel names them."""
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    return {f"{name}_{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("hw")}


def output_size_of(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[int, int]:
    """OH, OW."""
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    oh, ow = (output_size(*axis) for axis in sizes)
    return oh, ow


def largest_tile(size: int, tiles: tuple[int, ...]) -> int:
    """The tile that wastes least of its last copy along `size`; of equals, the largest."""
    return min(tiles, key=lambda tile: (-(-size // tile) * tile, -tile))
