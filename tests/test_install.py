"""What pip makes of the source tree: with a compiler, without one, and with one that fails."""

from __future__ import annotations

import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.packaging import (
    FAILING_COMPILER,
    PRETENDING_COMPILER,
    ROOT,
    TOUR,
    build_sdist,
    compiler,
    copy_of_source,
    install,
    pip_wheel,
    python,
    run,
)


def built(source: Path, folder: Path, **environment: str) -> Path:
    """The one wheel that pip builds."""
    result = pip_wheel(source, folder, **environment)
    assert result.code == 0, result.text
    (wheel,) = folder.glob("*.whl")
    return wheel


def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return build_sdist(copy_of_source(folder / "source"), folder)


def unpacked(sdist: Path, folder: Path) -> Path:
    """Wheels are built from the sdist, as on a machine that never saw the checkout."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)  # of our own making; `filter` is newer than Python 3.10
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture
def source(sdist: Path, tmp_path: Path) -> Path:
    return unpacked(sdist, tmp_path)


@pytest.fixture(scope="module")
def pretended(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its wheel, built in no time by a compiler that writes files with nothing in them."""
    folder = tmp_path_factory.mktemp("pretended")
    source = unpacked(sdist, folder)
    tool = compiler(folder, PRETENDING_COMPILER)
    return source, built(source, folder / "dist", CXX=tool, NVCC=tool)


def test_sdist_holds_the_whole_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in (
        "csrc/**/*",
        "fastalex/**/*.py",
        "kernels/**/*.py",
        "tests/**/*.py",
        "benchmarks/**/*.py",
    ):
        on_disk = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}
        assert on_disk <= held
    assert {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "README.md",
        "Makefile",
    } <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("how", [{"FASTALEX_BUILD": "none"}, {"CXX": "/nonexistent"}], ids=str)
def test_without_a_compiler_it_is_pure_python_and_says_so(source, tmp_path, how):
    build = pip_wheel(source, tmp_path / "dist", **how)
    assert build.code == 0, build.text
    missing = "no C++20 compiler '/nonexistent' was found: install one, or set CXX to where it is"
    assert (missing in build.text) == ("CXX" in how)  # it was not asked for otherwise
    (wheel,) = (tmp_path / "dist").glob("*-py3-none-any.whl")
    result = python(TOUR, install(wheel, tmp_path / "site"))
    assert result.code == 0, result.text
    assert str(tmp_path / "site") in result.text  # and not the checkout
    assert "lrn: runs on torch" in result.text
    sentence = "the CPU library was not built: install a C++20 compiler, then reinstall"
    assert f"cpu     no: {sentence}" in result.text  # explain
    assert f"backend cpu     absent: {sentence}" in result.text  # python -m fastalex


def test_forced_build_without_a_compiler_fails(source, tmp_path):
    result = pip_wheel(source, tmp_path / "dist", CXX="/nonexistent", FASTALEX_BUILD="cpu")
    assert result.code != 0
    assert "FASTALEX_BUILD=cpu, but no C++20 compiler '/nonexistent' was found" in result.text


def test_a_compiler_without_ninja_is_an_error(source):
    """A slow package that looks like a fast one would be the alternative."""
    hidden = "import runpy, sys; sys.modules['ninja'] = None; sys.argv = ['setup.py', 'build']; "
    code = hidden + "runpy.run_path('setup.py', run_name='__main__')"
    environment = {"CXX": "true", "NVCC": "/nonexistent", "FASTALEX_BUILD": "auto"}
    result = run([sys.executable, "-c", code], source, **environment)
    assert result.code != 0
    assert "ninja is not in the build environment: pip install ninja first" in result.text


def test_unknown_build_choice_fails(source, tmp_path):
    result = pip_wheel(source, tmp_path / "dist", FASTALEX_BUILD="cuda11")
    assert result.code != 0
    assert "FASTALEX_BUILD is 'cuda11'; it can be auto, cpu, cuda or none" in result.text


def test_forced_build_without_nvcc_fails(source, tmp_path):
    result = pip_wheel(source, tmp_path / "dist", FASTALEX_BUILD="cuda")
    assert result.code != 0
    assert "FASTALEX_BUILD=cuda, but no nvcc '/nonexistent' was found: install" in result.text


def test_a_folder_may_have_any_name(sdist, tmp_path):
    folder = tmp_path / "My $HOME: projects"
    folder.mkdir()
    tool = compiler(tmp_path, PRETENDING_COMPILER)
    built(unpacked(sdist, folder), folder / "dist", CXX=tool, NVCC=tool)


def test_an_ill_named_gpu_fails(source, tmp_path):
    tools = {"CXX": compiler(tmp_path, PRETENDING_COMPILER), "FASTALEX_CUDA_ARCH": "90a;hopper"}
    result = pip_wheel(source, tmp_path / "dist", NVCC=tools["CXX"], **tools)
    assert result.code != 0
    assert "FASTALEX_CUDA_ARCH has 'hopper'; it lists compute capabilities" in result.text


def test_a_compiler_that_fails_is_an_error_that_names_its_log(source, tmp_path):
    result = pip_wheel(source, tmp_path / "dist", CXX=compiler(tmp_path, FAILING_COMPILER))
    assert result.code != 0
    assert "could not build the CPU library (log: " in result.text
    log = Path(re.search(r"log: (\S+)\)", result.text)[1])
    assert "out of patience" in log.read_text()


def test_wheel_holds_the_package_and_its_library_for_every_python(pretended):
    _, wheel = pretended
    assert "-cp310-abi3-" in wheel.name
    files = names(wheel)
    for library in ("_cpu", "_cuda", "_cuda_plan"):
        assert f"fastalex/{library}.abi3.so" in files
    for header in [*(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "csrc/cuda").glob("*.h")]:
        assert f"fastalex/cuda/{header.name}" in files  # what NVRTC compiles at run time
    assert "fastalex/py.typed" in files
    assert "fastalex/kernels/__init__.py" in files
    for folder in ("fastalex", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder)
            assert str(Path("fastalex", "kernels" if folder == "kernels" else "", inside)) in files
    assert {name.partition("/")[0].partition("-")[0] for name in files} == {"fastalex"}


def test_a_corrupted_library_is_named_and_the_package_still_works(pretended, tmp_path):
    _, wheel = pretended
    result = python(TOUR, install(wheel, tmp_path / "site"))
    assert result.code == 0, result.text
    assert "the CPU library _cpu.abi3.so does not load into torch" in result.text
    assert "reinstall fastalex beside this torch" in result.text


def test_flags_keep_the_library_portable_and_exact(pretended):
    """No flag that ties the library to the building machine or changes what arithmetic means."""
    source, _ = pretended
    ninja = (source / "build/native/build.ninja").read_text()
    assert "-std=c++20" in ninja
    for flag in ("-march=native", "-mtune=native", "-ffast-math", "-Ofast", "--use_fast_math"):
        assert flag not in ninja
    for flag in ("-funsafe-math", "-ffinite-math", "-fassociative-math", "-freciprocal-math"):
        assert flag not in ninja


def test_the_cuda_library_is_built_for_every_gpu_it_can_serve(pretended):
    source, _ = pretended
    ninja = (source / "build/native/build.ninja").read_text()
    for name in ("80", "86", "89", "90a", "100", "120"):
        assert f"arch=compute_{name},code=sm_{name}" in ninja
    assert "arch=compute_120,code=compute_120" in ninja  # for GPUs to come
    assert "120+PTX" in ninja
    assert "-cudart static" in ninja
    assert "torch_cuda" not in ninja


@pytest.mark.slow
def test_sdist_builds_the_library_elsewhere(source, tmp_path):
    wheel = built(source, tmp_path / "dist", CXX=os.environ.get("CXX", "g++"), FASTALEX_BUILD="cpu")
    assert "-cp310-abi3-" in wheel.name
    result = python(TOUR, install(wheel, tmp_path / "site"))
    assert result.code == 0, result.text
    assert "lrn: runs on cpu" in result.text


def test_version_is_written_once():
    project = ROOT / "pyproject.toml"
    (version,) = re.findall(r'^version = "(.*)"', project.read_text(), re.MULTILINE)
    patterns = ("*.*", "[a-z]*/**/*.py", "docs/*.md")
    texts = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    changes = ROOT / "CHANGELOG.md"
    assert {path for path in texts if version in path.read_text()} == {project, changes}
    released = re.findall(r"^## (\S+)", changes.read_text(), re.MULTILINE)
    assert released[0] in (version, "Unreleased")


_OFFLINE = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"the network was asked for: {args}")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
"""


def test_nothing_asks_for_the_network():
    """Neither the import, nor every operator, nor a network of its own."""
    use = "fastalex.optimize(fastalex.models.alexnet('cifar10').eval(), torch.randn(1, 3, 32, 32))"
    result = run([sys.executable, "-c", f"{_OFFLINE}{TOUR}\n{use}"], ROOT)
    assert result.code == 0, result.text


def test_dependencies_are_few_and_bounded():
    """torch alone, from the version whose stable ABI the libraries use."""
    project = (ROOT / "pyproject.toml").read_text()
    assert '\ndependencies = ["torch>=2.11"]\n' in project
