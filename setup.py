"""Builds the shared libraries with CMake and puts them into the package. The rest is in pyproject.toml.

Environment: TQ_BUILD_DIR keeps the CMake build folder (default: a temporary one); TQ_REQUIRE_KERNELS names kernel libraries
("cpu cuda hip") without which the build fails; TQ_CUDA_ARCHITECTURES and TQ_HIP_COMPILER (each may be OFF) go to CMake.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"project\(tq_backend VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
KERNELS = ("cpu", "cuda", "hip")
TORCH_AT_LEAST = (2, 10)  # the stable ABI that csrc/torch is written against


def torch_dir() -> tuple[str, str]:
    """The folder of an installed torch whose headers the LibTorch ops are compiled with, or "", and a sentence about it.

    Only headers and one library are needed, and torch is large, so it is no build requirement: under pip's build isolation,
    which hides it from import, it is found in the environment that is installed into.
    """
    spec = importlib.util.find_spec("torch")
    beside = Path(sysconfig.get_path("purelib")) / "torch"
    found = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else beside
    if not (found / "version.py").is_file():
        return "", f"no torch in {beside.parent}, so no LibTorch ops; the vLLM plugin needs them: install torch first"
    version = re.search(r"__version__ = ['\"]([0-9]+)\.([0-9]+)", (found / "version.py").read_text())
    if version is None or (int(version[1]), int(version[2])) < TORCH_AT_LEAST:
        return "", f"the torch in {found} is older than {TORCH_AT_LEAST[0]}.{TORCH_AT_LEAST[1]}, so no LibTorch ops"
    return str(found), f"LibTorch ops with the headers of {found}"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Not self.build_temp: it outlives pip's build environment, and its cache would name a ninja that is gone.
        with tempfile.TemporaryDirectory(prefix="tq-backend-") as scratch:
            self.cmake(
                os.environ.get("TQ_BUILD_DIR") or scratch, Path(self.get_ext_fullpath(ext.name)).resolve().parent
            )

    def cmake(self, build: str, package: Path) -> None:
        import pybind11

        torch, about_torch = torch_dir()
        subprocess.run(
            [
                "cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                f"-DTQ_BUILD_TESTS={os.environ.get('TQ_BUILD_TESTS', 'OFF')}", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DTQ_TORCH_DIR={torch}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", str(package)], check=True)
        built = [kind for kind in KERNELS if (package / f"libtq_kernels_{kind}.so").exists()]
        print(f"tq-backend: built the kernel libraries: {', '.join(built)}; {about_torch}")
        missing = set(os.environ.get("TQ_REQUIRE_KERNELS", "").split()) - set(built)
        if missing:
            raise RuntimeError(f"TQ_REQUIRE_KERNELS asks for {', '.join(sorted(missing))}, which was not built here")


setup(version=VERSION, ext_modules=[Extension("tq_backend._native", [])], cmdclass={"build_ext": CMakeBuild})
