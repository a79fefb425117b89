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
_OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def find_idx(folder, name):
    """The path of `name`, plain or compressed, in `folder`; None if there is none."""
    return next((path for suffix in SUFFIXES if (path := Path(folder) / (name + suffix)).is_file()), None)


def read_idx(path):
    """Read an IDX file, plain, .gz or .xz.

    Returns: uint8 array of the shape that the file states, writable.
    Raises: ValueError when the file is damaged or of another format.
    """
    path = Path(path)
    with _OPENERS.get(path.suffix, open)(path, "rb") as file:
        try:
            content = file.read()
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{path} must be a complete compressed IDX file, got: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} must be an IDX file of unsigned bytes, got first bytes {content[:4].hex() or 'none'}")
    axes = content[3]
    shape = struct.unpack_from(f">{axes}I", content, 4) if len(content) >= 4 + 4 * axes else ()
    body = len(content) - 4 - 4 * axes
    if not shape or body != math.prod(shape):
        raise ValueError(f"{path} must hold {math.prod(shape)} bytes after its header, got {max(body, 0)}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def idx_bytes(array):
    """The IDX file's content for a uint8 array of any shape."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
