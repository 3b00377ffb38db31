"""Builds the shared libraries with CMake and puts them into the package. The rest is in pyproject.toml.

Environment: TQ_BUILD_DIR keeps the CMake build folder (default: a temporary one); TQ_REQUIRE_KERNELS names kernel libraries
("cpu cuda") without which the build fails.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"project\(tq_backend VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
KERNELS = ("cpu", "cuda", "hip")


def torch_dir() -> str:
    """The folder of an installed torch whose headers the LibTorch ops are compiled with, or "".

    Only headers and one library are needed, and torch is large, so it is no build requirement: under pip's build isolation,
    which hides it from import, it is found in the environment that is installed into.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return spec.submodule_search_locations[0]
    beside = Path(sysconfig.get_path("purelib")) / "torch"
    return str(beside) if (beside / "include" / "torch" / "csrc" / "stable").is_dir() else ""


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("TQ_BUILD_DIR") or Path(self.build_temp).resolve())
        torch = torch_dir()
        subprocess.run(
            [
                "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                f"-DTQ_BUILD_TESTS={os.environ.get('TQ_BUILD_TESTS', 'OFF')}", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DTQ_TORCH_DIR={torch}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(package)], check=True)
        built = [kind for kind in KERNELS if (package / f"libtq_kernels_{kind}.so").exists()]
        print(
            f"tq-backend: built kernel libraries: {', '.join(built)}; LibTorch ops: {'yes' if torch else 'no, torch not found'}"
        )
        missing = set(os.environ.get("TQ_REQUIRE_KERNELS", "").split()) - set(built)
        if missing:
            raise RuntimeError(f"TQ_REQUIRE_KERNELS asks for {', '.join(sorted(missing))}, which was not built here")


setup(version=VERSION, ext_modules=[Extension("tq_backend._native", [])], cmdclass={"build_ext": CMakeBuild})
