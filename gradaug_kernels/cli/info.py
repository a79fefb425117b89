"""What `gradaug info` shows."""

import importlib.metadata
import platform
from typing import Any

import torch

import gradaug_kernels as gk

from .. import models
from .._library import backends, build_config
from ..slim.paths import Convolution, explain_model
from .paths import DTYPES, explain_on, format_convolution, format_model

_WIDTHS = (1.0, 0.5)  # of the tables of a model


def collect_info(
    model: str | None = None, images: tuple[int, ...] = (32, 3, 224, 224), dtype: str = "float32"
) -> dict[str, Any]:
    """Versions, devices, build configuration, and {operator: {device: backend}} as plain values for JSON.

    With the name of a model, such as "torchvision/resnet50", also {batch norm: what it runs in one operator}, the rows
    of `gradaug_kernels.summary` at widths 1 and 0.5, and, where native code is built, who computes each layer on the
    CPU at these widths, of images of this shape and dtype.
    """
    versions = {"gradaug_kernels": gk.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    of_model = {}
    if model is not None:
        converted = gk.convert(models.build_model(model, 10))
        of_model["chains"] = gk.fused_chains(converted)
        of_model["layers"] = [row._asdict() for row in gk.summary(converted, _WIDTHS).rows]
        if build_config().get("cpu"):
            apart = gk.convert(models.build_model(model, 10), fuse_chains=False)
            of_model["paths"] = explain_model(apart, images, DTYPES[dtype], _WIDTHS)
    return {
        "versions": versions,
        "device": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "build": build_config(),
        "ops": backends(),
        **of_model,
    }


def collect_conv_info(conv: Convolution, dtype: str, devices: list[str]) -> dict[str, Any]:
    """{"capability": of the CPU, "paths": who computes a convolution in each direction, and why others do not}."""
    rows = [row for device in devices for row in explain_on(device, conv, DTYPES[dtype])]
    return {"capability": torch.backends.cpu.get_cpu_capability(), "paths": rows}


def format_conv_info(info: dict[str, Any]) -> str:
    """The same for people."""
    return "\n".join([f"paths, with {info['capability']} on the CPU", *format_convolution(info["paths"])])


def format_info(info: dict[str, Any]) -> str:
    """The same as a table for people."""
    lines = []
    for section in ("versions", "device", "build"):
        lines.append(section)
        entries = info[section] or {"native code": "none built"}
        lines += [f"  {name:<16} {_text(value)}" for name, value in entries.items()]
    devices = sorted({device for served in info["ops"].values() for device in served})
    width = max([9, *map(len, info["ops"])])
    lines += ["operators", f"  {'':<{width}} " + " ".join(f"{device:<10}" for device in devices)]
    for name, served in info["ops"].items():
        lines.append(f"  {name:<{width}} " + " ".join(f"{served.get(device, '-'):<10}" for device in devices))
    if "chains" in info:
        lines.append("batch norms, and what each runs in one operator")
        lines += [f"  {name:<{width}} {chain}" for name, chain in info["chains"].items()]
        rows = tuple(gk.LayerSummary(**row) for row in info["layers"])
        lines += ["channels at each width", *(f"  {line}" for line in str(gk.Summary(_WIDTHS, rows)).splitlines())]
    if "paths" in info:
        lines += ["paths on the CPU, at each width where they differ", *format_model(info["paths"])]
    return "\n".join(line.rstrip() for line in lines)


def _text(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
