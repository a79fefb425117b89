"""The IDX format of the MNIST family: magic (0, 0, type, number of axes), the big-endian sizes, then the bytes.

Format: http://yann.lecun.com/exdb/mnist (section "file formats"). Only unsigned bytes (type 8) occur here.
"""

import gzip
import lzma
import math
import struct
import zlib
from pathlib import Path

import numpy as np

SUFFIXES = ("", ".gz", ".xz")
LARGEST = 2**30  # bytes; MNIST's largest relative, EMNIST's 814,255 images, takes 0.6 of it
_OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def find_idx(folder, name):
    """The path of `name`, plain or compressed, in `folder`; None if there is none."""
    return next((path for suffix in SUFFIXES if (path := Path(folder) / (name + suffix)).is_file()), None)


def read_idx(path):
    """Read an IDX file, plain, .gz or .xz.

    Of a compressed file no more is unpacked than its header states, and at most 1 GiB.
    Returns: uint8 array of the shape that the file states, writable.
    Raises: ValueError when the file is damaged, too large or of another format.
    """
    path = Path(path)
    with _OPENERS.get(path.suffix, open)(path, "rb") as file:
        try:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08":
                raise ValueError(
                    f"{path} must be an IDX file of unsigned bytes, got first bytes {magic.hex() or 'none'}"
                )
            sizes = file.read(4 * magic[3])
            shape = struct.unpack(f">{magic[3]}I", sizes) if len(sizes) == 4 * magic[3] else ()
            expected = math.prod(shape)
            if not shape or not 0 < expected <= LARGEST:
                raise ValueError(
                    f"{path} must state sizes of 1 to {LARGEST} bytes in its header, got {list(shape) or 'none'}"
                )
            content = bytearray(file.read(expected))
            if len(content) < expected or file.read(1):
                found = len(content) if len(content) < expected else "more"
                raise ValueError(f"{path} must hold {expected} bytes after its header, got {found}")
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{path} must be a complete compressed IDX file, got: {error}") from None
    return np.frombuffer(content, np.uint8).reshape(shape)


def idx_bytes(array):
    """The IDX file's content for a uint8 array of any shape."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
