"""Builds the native kernels: C++ for the CPU always, CUDA C++ where a matching nvcc is found.

    GRADAUG_BUILD_EXT=0     no native code: a GPU runs Triton, cuBLAS and cuDNN, a CPU the PyTorch references
    GRADAUG_BUILD_CUDA=0|1  0: skip CUDA even where nvcc is found; 1: fail where it cannot be built
    GRADAUG_BUILD_CACHE     a folder for built libraries, in place of ~/.cache/gradaug_kernels; 0: none
    TORCH_CUDA_ARCH_LIST    the targets of the CUDA kernels; the default is in CUDA_ARCHS
    MAX_JOBS                parallel compiler processes

A GPU need not be present. What was decided is printed before anything compiles and kept beside the libraries in
_build.json, which `gradaug info` shows and which the package checks against the torch it imports. A library is
compiled once for the same sources, flags, compiler, Python and torch, and then taken from the folder for built ones.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from built_libraries import keep, kept_library, take  # noqa: E402
from gradaug_build import flag, require_compiler  # noqa: E402

PACKAGE = "gradaug_kernels"
CUDA_ARCHS = "8.0;9.0+PTX"
NEED_LIBRARIES = {"build", "build_ext", "bdist", "bdist_wheel", "develop", "editable_wheel", "install"}


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def nvcc_version(cuda_home: str | None) -> str | None:
    """'13.0' for the nvcc under cuda_home, None where there is none."""
    nvcc = Path(cuda_home or "/nonexistent", "bin", "nvcc")
    if not nvcc.exists():
        return None
    found = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    return found and found.group(1)


def pip_cuda_folders() -> tuple[list[str], list[str]]:
    """Headers and libraries that torch's own pip dependencies install: cuBLAS, cuSPARSE and cuSOLVER headers
    are included by torch's CUDA headers and are missing from a minimal toolkit."""
    import torch

    site = Path(torch.__file__).parent.parent
    includes = sorted(str(path) for path in site.glob("nvidia/*/include") if path.is_dir())
    libraries = sorted(str(path) for path in site.glob("nvidia/*/lib") if path.is_dir())
    return includes, libraries


def cuda_folders(nvcc: str, cuda_home: str) -> tuple[list[str], list[str]] | None:
    """Headers and libraries beside those that nvcc finds itself; None where the ones that torch needs are missing.

    The C++ library of a toolkit refuses the headers of another release.
    """
    includes, libraries = pip_cuda_folders()
    if cudart_version(includes) in (None, nvcc):
        return includes, libraries
    own = [Path(cuda_home, "include", header) for header in ("cublas_v2.h", "cusparse.h", "cusolverDn.h")]
    return ([], []) if all(header.exists() for header in own) else None


def cudart_version(includes: list[str]) -> str | None:
    """'13.0' for the CUDA runtime's headers in one of the folders, None where there are none."""
    for header in (Path(folder, "cuda_runtime_api.h") for folder in includes):
        if header.exists():
            number = int(re.search(r"#define CUDART_VERSION +(\d+)", header.read_text()).group(1))
            return f"{number // 1000}.{number % 1000 // 10}"
    return None


def toolkit_libraries(cuda_home: str) -> list[str]:
    """Where nvcc itself links cudart from. The nvcc under cuda_home may be a link or a script that calls another."""
    nvcc = Path(cuda_home, "bin", "nvcc")
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return [folder for line in re.findall(r"#\$ LIBRARIES=(.*)", plan) for folder in re.findall(r'"-L([^"]+)"', line)]


def why_no_cuda() -> str | None:
    """None if the CUDA extension can be built, otherwise the reason."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if flag("GRADAUG_BUILD_CUDA") == "0":
        return "GRADAUG_BUILD_CUDA=0"
    found = nvcc_version(CUDA_HOME)
    if found is None:
        return "no nvcc found (set CUDA_HOME if there is one)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if found.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {found}, torch {torch.__version__} was built with CUDA {torch.version.cuda}"
    if cuda_folders(found, CUDA_HOME) is None:
        theirs = cudart_version(pip_cuda_folders()[0])
        return (
            f"nvcc is CUDA {found} without cuBLAS, cuSPARSE and cuSOLVER headers, and those that torch "
            f"{torch.__version__} brings are of CUDA {theirs}"
        )
    return None


def native_extensions():
    """The extensions, and the build configuration as a dict."""
    if flag("GRADAUG_BUILD_EXT") == "0":
        return [], {"cpu": False, "cuda": False, "why_no_cuda": "GRADAUG_BUILD_EXT=0"}

    require_compiler()
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    cxx = ["-O3", "-std=c++20", "-fopenmp", "-DAT_PARALLEL_OPENMP=1"]
    link = [] if "--debug" in sys.argv else ["-Wl,--strip-debug"]  # Python's own flags have -g: 54 MB, or 4 MB
    extensions = [
        CppExtension(
            "gradaug_kernels._autograd",
            ["csrc/autograd.cpp"],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
        ),
        CppExtension(
            "gradaug_kernels._cpu",
            sources("csrc/module.cpp", "csrc/cpu/**/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx},
            extra_link_args=["-fopenmp", *link],
        ),
    ]
    config = {"cpu": True, "torch": torch.__version__, "cxx_flags": " ".join(cxx)}

    reason = why_no_cuda()
    if reason and flag("GRADAUG_BUILD_CUDA") == "1":
        raise SystemExit(f"GRADAUG_BUILD_CUDA=1 asks for the CUDA extension, but {reason}")
    if reason is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        includes, libraries = cuda_folders(nvcc_version(CUDA_HOME), CUDA_HOME)
        nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]
        extensions.append(
            CUDAExtension(
                "gradaug_kernels._cuda",
                sources("csrc/module.cpp", "csrc/cuda/*.cu"),
                include_dirs=[str(ROOT / "csrc"), *includes],
                library_dirs=[*libraries, *toolkit_libraries(CUDA_HOME)],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                extra_link_args=link,
            )
        )
        config |= {
            "cuda": nvcc_version(CUDA_HOME),
            "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"],
            "nvcc_flags": " ".join(nvcc),
        }
    else:
        config |= {"cuda": False, "why_no_cuda": reason}
    return extensions, config | {"sources": runpy.run_path(ROOT / PACKAGE / "_sources.py")["digest"](ROOT / "csrc")}


def commands(extensions, config: dict) -> dict:
    """setuptools' commands with _build.json, which a build in place leaves in the sources, as it does the libraries."""

    def write_config(folder) -> None:
        Path(folder, PACKAGE, "_build.json").write_text(json.dumps(config, indent=2) + "\n")

    if not extensions:

        class BuildModules(build_py):
            def run(self):
                super().run()
                write_config(ROOT if self.editable_mode else self.build_lib)

        return {"build_py": BuildModules}

    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        def run(self):
            super().run()
            write_config(ROOT if self.inplace else self.build_lib)

        def build_extension(self, extension):
            library = Path(self.get_ext_fullpath(extension.name))
            kept = kept_library(library.name, extension, config)
            if kept and take(kept, library):
                print(f"{extension.name} was compiled before: {kept}", flush=True)
                return
            super().build_extension(extension)
            if kept:
                keep(library, kept)

    return {"build_ext": BuildLibraries}


def main():
    if not NEED_LIBRARIES & set(sys.argv):  # the metadata and the sdist are the same with and without
        setup()
        return
    extensions, config = native_extensions()
    print("gradaug_kernels build configuration")
    for key, value in config.items():
        print(f"  {key:12} {value}", flush=True)
    setup(ext_modules=extensions, cmdclass=commands(extensions, config))


if __name__ == "__main__":
    main()
