"""What serves CUDA tensors from Python; importing this registers it. `paths` says which of it serves a convolution.

The C++ kernels of csrc/cuda are not here but in the built library `_cuda`, whose name this folder cannot share.
"""

from . import operators as operators
