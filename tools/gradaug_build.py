"""The build backend (PEP 517): setuptools', with the target environment's torch, and nothing written into the sources.

A library built with one release of torch cannot be loaded by another. pip builds in an environment of its own, where
a requirement `torch` means the newest release, whichever one the package is installed beside. But pip runs the backend
with the interpreter of the environment that it installs into, and merely hides its site-packages: a supported torch
that is there is put back at the end of sys.path, and only where there is none torch is a build requirement. That also
serves builds of torch that no package index has, and spares a second copy of it.

`python -m build` and uv make a build environment that knows no target. It gets the newest supported torch, unless
their options say otherwise (`python -m build --no-isolation`, `uv pip install --no-build-isolation .`).
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).resolve().parent.parent


def flag(name: str) -> str | None:
    """An environment variable that is "0", "1" or not set."""
    value = os.environ.get(name)
    if value not in (None, "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return value


def cxx_compiler() -> list[str]:
    """The C++ compiler's command, as torch's extension builder chooses it."""
    return shlex.split(os.environ.get("CXX", "c++"))


def require_compiler() -> None:
    """Stop with one sentence where the native code cannot be compiled, before anything large is downloaded."""
    compiler, headers = cxx_compiler()[0], sysconfig.get_path("include")
    if not shutil.which(compiler):
        missing = f"a C++20 compiler, and {compiler} is not found (Debian: apt-get install g++)"
    elif not Path(headers, "Python.h").exists():
        missing = f"Python's headers, and {headers} has no Python.h (Debian: apt-get install python3-dev)"
    else:
        return
    raise SystemExit(f"gradaug_kernels needs {missing}; with GRADAUG_BUILD_EXT=0 it installs without native code")


def torch_requirement() -> str:
    """The supported releases, from the package's dependencies: "torch>=2.11,<2.16"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(each for each in project["dependencies"] if re.match(r"torch\b", each))


def is_supported(version: str) -> bool:
    """Whether torch `version` is in the range of `torch_requirement`, by its first two numbers."""
    low, high = (tuple(map(int, numbers)) for numbers in re.findall(r"(\d+)\.(\d+)", torch_requirement()))
    found = re.match(r"(\d+)\.(\d+)", version)
    return low <= tuple(map(int, found.groups())) < high


def target_site_packages() -> str | None:
    """The site-packages of the environment that the wheel is for, if a supported torch is there."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    for folder in folders:
        for found in importlib.metadata.distributions(name="torch", path=[folder]):
            if Path(folder, "torch", "__init__.py").exists() and is_supported(found.version):
                return folder
    return None


def show_target_torch() -> bool:
    """Make torch importable, unless that needs a download. Returns: whether it is."""
    if importlib.util.find_spec("torch") is None and (folder := target_site_packages()):
        sys.path.append(folder)
    return importlib.util.find_spec("torch") is not None


@contextlib.contextmanager
def outside_the_sources():
    """Let setuptools keep what it makes on the way in a temporary folder; DIST_EXTRA_CONFIG that is set stays."""
    with tempfile.TemporaryDirectory(prefix="gradaug-build-") as folder:
        config = Path(folder, "setup.cfg")
        config.write_text(f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n")
        kept = os.environ.get("DIST_EXTRA_CONFIG")
        os.environ.setdefault("DIST_EXTRA_CONFIG", str(config))
        try:
            yield Path(folder)
        finally:
            if kept is None:
                del os.environ["DIST_EXTRA_CONFIG"]


def get_requires_for_build_sdist(config_settings=None):
    return []


def get_requires_for_build_wheel(config_settings=None):
    if flag("GRADAUG_BUILD_EXT") == "0":
        return []
    require_compiler()
    return ["ninja", "numpy", *([] if show_target_torch() else [torch_requirement()])]


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with outside_the_sources():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    show_target_torch()
    with outside_the_sources():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """The one build that writes into the sources: the libraries, beside the modules that import them."""
    show_target_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    """setuptools' sdist, of a copy of the files that it lists: it makes links and folders beside them."""
    with outside_the_sources() as folder:
        build_meta.prepare_metadata_for_build_wheel(str(folder))
        listed = (folder / "gradaug_kernels.egg-info" / "SOURCES.txt").read_text().splitlines()
        copy = folder / "copy"
        for name in listed:
            if (ROOT / name).is_file() and not Path(name).is_absolute():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        os.environ.pop("DIST_EXTRA_CONFIG")
        os.chdir(copy)
        try:
            return build_meta.build_sdist(sdist_directory, config_settings)
        finally:
            os.chdir(ROOT)
            os.environ["DIST_EXTRA_CONFIG"] = str(folder / "setup.cfg")
