"""Where the constants are in csrc/cpu."""

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .constants import CONSTANTS, Constant, Number

CPU = Path(__file__).parents[2] / "csrc" / "cpu"


class Place(NamedTuple):
    path: Path
    line: int
    begin: int
    end: int
    text: str  # "4 * 1024"

    @property
    def value(self) -> Number:
        return number(self.text)

    def replaced(self, value: Number) -> str:
        """The text of the file with another value."""
        source = self.path.read_text()
        return f"{source[: self.begin]}{value!r}{source[self.end :]}"


def number(text: str) -> Number:
    """Raises: ValueError where a C++ expression has anything but numbers."""
    if re.fullmatch(r"(?:[\d\s.*+-]|<<)+", text):
        with suppress(SyntaxError):
            return eval(text.strip())
    raise ValueError(f"a constant must be made of numbers, got {text!r}")


def code(path: Path) -> str:
    """A source with blanks in place of comments, so that positions stay."""
    return re.sub(r"//.*", lambda comment: " " * len(comment[0]), path.read_text())


def find(constant: Constant, cpu: Path = CPU) -> Place:
    """Where a constant is in the sources.

    Raises:
        LookupError: where it is not there exactly once.
    """
    pattern = constant.pattern or rf"\bconstexpr\s[^;]*?\b{constant.name}\s*=\s*([^,;]+)[,;]"
    places = []
    for path in sorted(cpu.glob(constant.of.file)):
        text = code(path)
        for found in re.finditer(pattern, text):
            places.append(Place(path, text.count("\n", 0, found.start(1)) + 1, *found.span(1), found[1]))
    if len(places) != 1:
        raise LookupError(f"csrc/cpu/{constant.of.file} must have {constant.name} once, got it {len(places)} times")
    return places[0]


def chosen(name: str) -> Constant:
    """The constant of a name, with its file's before it where others have the name too: "paths.cpp:kMaxPixels".

    Raises:
        ValueError: where it names none or several.
    """
    file, _, last = name.rpartition(":")
    found = [
        each for each in CONSTANTS if each.name == last and (not file or f"/{find(each).path}".endswith(f"/{file}"))
    ]
    if len(found) > 1:
        names = " or ".join(f"{find(each).path.name}:{each.name}" for each in found)
        raise ValueError(f"a name must be that of one constant, {names}, got {name}")
    if not found:
        raise ValueError(f"a name must be in the list that `python -m benchmarks.fit` prints, got {name}")
    return found[0]
