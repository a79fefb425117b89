"""What is built and installed: the backend, the sdist, the wheel without native code, and a clone without libraries."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

import gradaug_kernels
from gradaug_kernels import _library

ROOT = Path(__file__).parents[2]
LIBRARIES = [f"{name}{EXTENSION_SUFFIXES[0]}" for name in ("_autograd", "_cpu")]

SERVED = """
import torch
import gradaug_kernels as gk
from gradaug_kernels._library import backends
print(gk.__file__, sorted({served["cpu"] for served in backends().values()}))
print("on a GPU", {name: backends()[name]["cuda"] for name in ("slim_conv2d", "slim_linear", "slim_norm_conv2d")})
"""
# A training step needs every part of the package but the data and the command line.
STEP = f"""{SERVED}
model = gk.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                                       torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)))
step = gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.1), resolutions=(8, 6))
losses = step(torch.randn(4, 3, 8, 8), torch.arange(4))
assert all(torch.isfinite(loss) for loss in (losses.full, *losses.subnets))
"""


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("gradaug_build")


@pytest.fixture
def built_libraries(backend):
    return importlib.import_module("built_libraries")


def run(program, folder, *search, **environment):
    """stdout and stderr of a Python program that runs in a folder, which is the first that it imports from."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search)), **environment}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


needs_libraries = pytest.mark.skipif(not _library.build_config().get("cpu"), reason="built with GRADAUG_BUILD_EXT=0")
builds = pytest.mark.skipif(
    int(setuptools.__version__.split(".")[0]) < 77 or not (ROOT / "tools").is_dir(),
    reason="needs setuptools 77 or newer and the sources",
)


def copy_package(folder):
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    source = Path(gradaug_kernels.__file__).parent
    return Path(shutil.copytree(source, folder / "gradaug_kernels", ignore=ignore))


def copy_libraries(folder, sources):
    built = _library.build_config()
    for name in LIBRARIES:
        shutil.copy(Path(built["folder"], name), folder)
    (folder / "_build.json").write_text(json.dumps(built | {"cuda": False, "sources": sources}))


@pytest.fixture
def clone(tmp_path):
    """A clone in which nothing was built, and whose sources no installed package was built from."""
    folder = tmp_path / "clone"
    copy_package(folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "csrc" / "changed.h").touch()
    return folder


def test_a_clone_without_libraries_runs_on_its_references_and_says_so_once(clone):
    done = run(STEP, clone)
    assert done.returncode == 0, done.stderr
    assert "['composite', 'reference']" in done.stdout
    assert done.stderr.count("RuntimeWarning: gradaug_kernels runs on its PyTorch references") == 1
    assert f"{clone / 'gradaug_kernels'} has no" in done.stderr
    assert "run `pip install -e .`" in done.stderr


def test_a_half_built_clone_says_what_is_missing(monkeypatch, tmp_path):
    (tmp_path / LIBRARIES[0]).touch()
    config = {"cpu": True, "cuda": False, "torch": torch.__version__, "folder": str(tmp_path)}
    monkeypatch.setattr(_library, "build_config", lambda: config)
    monkeypatch.setattr(_library, "_import_library", lambda name, path: pytest.fail("all libraries or none"))
    with pytest.warns(RuntimeWarning, match=rf"runs on its PyTorch references.* has no {re.escape(LIBRARIES[1])}; run"):
        _library.load_native()


def test_libraries_of_other_sources_than_the_clone_has_are_reported(monkeypatch, tmp_path):
    for name in LIBRARIES:
        (tmp_path / name).touch()
    config = {"cpu": True, "cuda": False, "torch": torch.__version__, "folder": str(tmp_path), "sources": "1"}
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    monkeypatch.setattr(_library, "build_config", lambda: config)
    monkeypatch.setattr(_library, "_import_library", lambda name, path: None)
    monkeypatch.setattr(_library, "_clone_sources", lambda: "2")
    with pytest.warns(RuntimeWarning, match="of other sources than csrc/ has now; run `python setup.py build_ext"):
        _library.load_native()
    for fitting in ("1", None):  # None: installed, without csrc/
        monkeypatch.setattr(_library, "_clone_sources", lambda fitting=fitting: fitting)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _library.load_native()


def test_a_clone_takes_the_libraries_that_fit_its_sources_torch_and_python(monkeypatch, tmp_path):
    def put(folder, libraries=LIBRARIES, **config):
        path = tmp_path / folder / "gradaug_kernels"
        path.mkdir(parents=True)
        for name in libraries:
            (path / name).touch()
        config = {"cpu": True, "cuda": False, "torch": torch.__version__, "sources": "1"} | config
        (path / "_build.json").write_text(json.dumps(config))
        return path

    def found():
        folder = _library.build_config.__wrapped__().get("folder")
        return folder and Path(folder).parent.name

    monkeypatch.setattr(_library, "_clone_sources", lambda: "1")
    monkeypatch.setattr(sys, "path", [str(tmp_path / name) for name in ("clone", "others", "release", "half")])
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "clone" / "gradaug_kernels" / "_library.py"))
    put("others", sources="2")
    put("release", torch="1.0.0")
    put("half", libraries=LIBRARIES[:1])
    assert found() is None
    own = put("clone", sources="2")
    assert found() == "clone", "its own, of which the import then says what is wrong"
    fitting = put("fitting")
    sys.path.append(str(fitting.parent))
    assert found() == "fitting"
    (own / "_build.json").write_text((fitting / "_build.json").read_text())
    assert found() == "clone"
    (own / "_build.json").unlink()
    monkeypatch.setattr(_library, "_clone_sources", lambda: None)
    assert found() is None, "an installed package has its own libraries or none"


@needs_libraries
def test_a_clone_runs_on_the_installed_libraries(clone, tmp_path):
    installed = copy_package(tmp_path / "site-packages")
    copy_libraries(installed, _library.digest(clone / "csrc"))
    done = run(SERVED, clone, installed.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{clone / 'gradaug_kernels' / '__init__.py'} ['composite', 'cpp']" in done.stdout


def test_without_torchvision_the_package_and_its_own_networks_work(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    program = """
import sys
from gradaug_kernels.cli import main
assert main(["info"]) == 0
assert main(["train", "quickstart", "--out", "out", "--epochs", "1", "--per-class", "2",
             "--set", "train.batch_size=20"]) == 0
assert main(["info", "--model", "torchvision/resnet18"]) == 2
"""
    done = run(program, tmp_path, *sys.path)
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gradaug: error: torchvision.models must come from a torchvision for torch ")
    assert "operator nms does not exist" in last
    assert "run `pip install --upgrade torchvision torch==" in last


def test_version(capsys):
    from gradaug_kernels.cli.main import main

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"gradaug_kernels {gradaug_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("installed", "asked"),
    [
        ("2.12.1", []),
        ("2.12.0+cpu", []),
        ("2.10.0", ["torch>=2.11,<2.16"]),
        ("2.16.0.dev1", ["torch>=2.11,<2.16"]),
        (None, ["torch>=2.11,<2.16"]),
    ],
)
def test_the_build_asks_for_torch_only_where_the_target_has_none_that_fits(
    backend, monkeypatch, tmp_path, installed, asked
):
    if installed:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").touch()
        (tmp_path / f"torch-{installed}.dist-info").mkdir()
        (tmp_path / f"torch-{installed}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {installed}\n")
    monkeypatch.setattr(backend.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(backend, "require_compiler", lambda: None)
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools")])
    monkeypatch.setattr(sys, "prefix", "of a virtual environment")
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("GRADAUG_BUILD_EXT", raising=False)
    assert backend.get_requires_for_build_wheel() == ["ninja", "numpy", *asked]
    assert (str(tmp_path) in sys.path) == (not asked)


def test_without_a_compiler_one_sentence_says_how_to_install_without(backend, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    monkeypatch.delenv("GRADAUG_BUILD_EXT", raising=False)
    with pytest.raises(SystemExit, match=r"^gradaug_kernels needs a C\+\+20 compiler, .* GRADAUG_BUILD_EXT=0 .*"):
        backend.get_requires_for_build_wheel()
    monkeypatch.setenv("GRADAUG_BUILD_EXT", "0")
    assert backend.get_requires_for_build_wheel() == []


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def build(kind, out, **environment):
    """What the backend builds into a folder, by a process of its own as pip has it, which may not touch the sources."""
    before = files_of(ROOT / "gradaug_kernels") | files_of(ROOT / "csrc"), sorted(os.listdir(ROOT))
    program = f"import gradaug_build; print(gradaug_build.build_{kind}({str(out)!r}))"
    done = run(program, ROOT, ROOT / "tools", PYTHONDONTWRITEBYTECODE="1", **environment)
    assert done.returncode == 0, done.stderr
    assert before == (files_of(ROOT / "gradaug_kernels") | files_of(ROOT / "csrc"), sorted(os.listdir(ROOT)))
    return out / done.stdout.splitlines()[-1]


@builds
def test_the_sdist_has_all_sources_whatever_can_be_built_here(tmp_path):
    archive = build("sdist", tmp_path, GRADAUG_BUILD_EXT="0")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = [path for folder in ("csrc", "tests", "tools") for path in (ROOT / folder).rglob("*") if path.is_file()]
    needed = {path.relative_to(ROOT).as_posix() for path in needed if path.suffix != ".pyc"}
    assert needed - names == set()
    assert {
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "gradaug_kernels/recipes/presets/quickstart.toml",
    } <= names
    assert not [name for name in names if name.endswith((".so", "_build.json", ".pyc")) or name.startswith("/")]


@builds
def test_the_wheel_without_native_code_is_for_every_platform_and_trains(tmp_path):
    wheel = build("wheel", tmp_path, GRADAUG_BUILD_EXT="0")
    assert wheel.name == f"gradaug_kernels-{gradaug_kernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    done = run(STEP, tmp_path, tmp_path / "installed")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "installed") in done.stdout
    assert "['composite', 'reference']" in done.stdout
    on_gpu = {"slim_conv2d": "gemm+cudnn+triton+depthwise", "slim_linear": "gemm", "slim_norm_conv2d": "triton"}
    if importlib.util.find_spec("triton"):
        assert f"on a GPU {on_gpu}" in done.stdout


def test_a_library_is_compiled_again_when_what_decides_about_it_changes(built_libraries, monkeypatch):
    def name(sources="1", flags=("-O3",), cuda=False, files=("csrc/module.cpp",), **environment):
        extension = SimpleNamespace(
            name="gradaug_kernels._cpu",
            sources=list(files),
            extra_compile_args={"cxx": list(flags)},
            extra_link_args=[],
        )
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            return built_libraries.fingerprint(extension, {"sources": sources, "cuda": cuda, "cuda_archs": "9.0"})

    assert name() == name()
    assert name(cuda="13.0") == name(), "what CUDA is found does not concern a library for the CPU"
    different = [name(), name(sources="2"), name(flags=["-O2"]), name(CXXFLAGS="-g"), name(CC="cc", LDFLAGS="-s")]
    different += [name(files=["csrc/cuda/slim_conv2d.cu"], cuda=version) for version in ("12.8", "13.0")]
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    different.append(name())
    assert len(set(different)) == 8
    assert name(CXXFLAGS="-march=native") is None


def test_kept_libraries_are_taken_and_the_oldest_forgotten(built_libraries, monkeypatch, tmp_path):
    library, cache = tmp_path / "_cpu.so", tmp_path / "cache"
    assert not built_libraries.take(cache / "0" / "_cpu.so", library)
    for age in range(built_libraries.KEPT + 2):
        library.write_text(str(age))
        built_libraries.keep(library, cache / str(age) / "_cpu.so")
        os.utime(cache / str(age) / "_cpu.so", (age, age))
    built_libraries.keep(library, cache / "newest" / "_cpu.so")
    assert len(list(cache.iterdir())) == built_libraries.KEPT
    assert not (cache / "0").exists()
    assert built_libraries.take(cache / "5" / "_cpu.so", library)
    assert library.read_text() == "5"
    monkeypatch.setenv("GRADAUG_BUILD_CACHE", "0")
    assert built_libraries.cache_folder() is None


def test_headers_of_another_cuda_release_are_not_mixed_in(tmp_path, monkeypatch):
    setup = runpy.run_path(str(ROOT / "setup.py"))
    toolkit, pip = tmp_path / "toolkit", tmp_path / "pip" / "include"
    for folder in (toolkit / "include", pip):
        folder.mkdir(parents=True)
    (pip / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13020\n")
    monkeypatch.setitem(setup["cuda_folders"].__globals__, "pip_cuda_folders", lambda: ([str(pip)], ["libraries"]))
    assert setup["cuda_folders"]("13.2", str(toolkit)) == ([str(pip)], ["libraries"])
    assert setup["cuda_folders"]("13.0", str(toolkit)) is None
    for header in ("cublas_v2.h", "cusparse.h", "cusolverDn.h"):
        (toolkit / "include" / header).touch()
    assert setup["cuda_folders"]("13.0", str(toolkit)) == ([], [])
    assert setup["cudart_version"]([str(tmp_path)]) is None
