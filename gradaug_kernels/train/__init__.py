"""Training recipes: presets, the training run, and the command line `gradaug`."""

from ..recipes.config import Config, load_config, preset_names
from .run import train

__all__ = ["Config", "load_config", "preset_names", "train"]
