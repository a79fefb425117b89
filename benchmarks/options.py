"""The options of the command line and of pytest: argparse and pytest declare them alike."""

from collections.abc import Callable, Iterable
from pathlib import Path

from .cases import DTYPES, MODELS
from .providers import PROVIDERS


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def providers(text: str) -> tuple[str, ...]:
    found = names(text)
    if unknown := set(found) - set(PROVIDERS):
        raise ValueError(f"providers must be of {', '.join(PROVIDERS)}, got {', '.join(sorted(unknown))}")
    return found


def widths(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


OPTIONS = {
    "model": dict(
        type=names, default=MODELS, help="networks, separated by commas: torchvision's, or wrn-<depth>-<factor>"
    ),
    "batch": dict(type=int, help="images per batch; the network's own by default"),
    "size": dict(type=int, help="pixels; the network's own by default, and sub-networks' in proportion"),
    "dtype": dict(choices=tuple(DTYPES), default="fp32", help="bf16 and fp16 are autocast"),
    "widths": dict(type=widths, default=(1.0, 0.93, 0.8), help="widths, separated by commas"),
    "providers": dict(type=providers, default=("ours", "eager"), help=f"of {', '.join(PROVIDERS)}"),
    "threads": dict(type=int, default=2, help="threads of the CPU"),
    "repeats": dict(type=int, default=9, help="samples of each provider"),
    "json": dict(type=Path, help="file to write the rows to"),
    "csv": dict(type=Path, help="file to append the rows to"),
}


def add_options(add: Callable, chosen: Iterable[str]) -> None:
    for name in chosen:
        add(f"--{name}", **OPTIONS[name])
