"""torchvision, for the parts that need it: its networks, data sets and transforms. The rest of the package does not."""

import importlib
import importlib.metadata
from types import ModuleType

import torch


def torchvision_module(name: str) -> ModuleType:
    """The module torchvision.<name>, imported by whoever uses it when that is used.

    Raises: ImportError where torchvision is missing, or is one for another torch and cannot be imported.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators do not fit this torch
        release = torch.__version__.split("+")[0]
        try:
            found = f"torchvision {importlib.metadata.version('torchvision')}, which cannot be imported ({error})"
        except importlib.metadata.PackageNotFoundError:
            found = "no torchvision"
        raise ImportError(
            f"torchvision.{name} must come from a torchvision for torch {release}, got {found}; "
            f"run `pip install --upgrade torchvision torch=={release}`"
        ) from error
