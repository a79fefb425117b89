"""Libraries that were compiled before, by a name for all that decides about their contents."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

from gradaug_build import cxx_compiler

KEPT = 12
VARIABLES = ("CFLAGS", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "LDSHARED", "CPATH", "NVCC_APPEND_FLAGS")


def kept_library(filename: str, extension, config: dict) -> Path | None:
    """Where the library of an extension is kept once it is compiled. None where that must not be or cannot be done."""
    folder, name = cache_folder(), fingerprint(extension, config)
    return folder / name / filename if folder and name else None


def cache_folder() -> Path | None:
    """GRADAUG_BUILD_CACHE or ~/.cache/gradaug_kernels, if it is this user's own: a library is code."""
    chosen = os.environ.get("GRADAUG_BUILD_CACHE")
    if chosen == "0":
        return None
    folder = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gradaug_kernels"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder.absolute() if folder.stat().st_uid == os.geteuid() and os.access(folder, os.W_OK) else None


def fingerprint(extension, config: dict) -> str | None:
    """A hash of sources, flags, compiler, Python and torch. None where the processor compiled on decides, too."""
    import torch

    cuda = any(source.endswith(".cu") for source in extension.sources)
    parts = {
        "config": {key: config[key] for key in ("sources", *(("cuda", "cuda_archs") if cuda else ()))},
        "extension": [extension.name, extension.sources, extension.extra_compile_args, extension.extra_link_args],
        "torch": [torch.__version__, torch.version.git_version, torch.version.cuda],
        "python": [sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_config_vars("CFLAGS", "LDCXXSHARED", "CXX")],
        "machine": [platform.system(), platform.machine()],
        "compiler": subprocess.check_output([*cxx_compiler(), "--version"], text=True),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }
    text = json.dumps(parts, sort_keys=True)
    return None if "=native" in text else hashlib.sha256(text.encode()).hexdigest()[:24]


def take(kept: Path, library: Path) -> bool:
    """Copy a kept library to where it is built. Returns: whether there is one."""
    library.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(kept, library)
        os.utime(kept)
    except OSError:
        return False
    return True


def keep(library: Path, kept: Path) -> None:
    """Copy a library to where it is kept, all of it at once, and forget those that were not used for longest."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library, partial)
        os.replace(partial, kept)
    except OSError as error:  # a full disk, say: the library itself is built all the same
        print(f"{library.name} is not kept for the next build: {error}")
    by_age = sorted(kept.parent.parent.glob("*/*.so"), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-KEPT]:
        shutil.rmtree(old.parent, ignore_errors=True)
