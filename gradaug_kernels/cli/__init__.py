"""The command line `gradaug`."""

from .main import main

__all__ = ["main"]
