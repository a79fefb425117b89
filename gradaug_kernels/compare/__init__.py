"""Several methods with several seeds, at equal epochs and at equal compute."""

from .run import compare

__all__ = ["compare"]
