"""Which native sources a library was built from. setup.py runs this file by itself, before there is a package."""

import hashlib
from pathlib import Path


def digest(csrc: Path) -> str:
    """A hash of the names and contents of all files under csrc/, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        found.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]
