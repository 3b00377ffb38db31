"""What `pip install` put on this machine: files, entry points, metadata, and libraries that find each other anywhere.

Nothing is built here. The package must be installed the ordinary way (a wheel's files in site-packages).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = metadata.distribution("tq-backend")
PACKAGE = Path(str(DISTRIBUTION.locate_file("tq_backend")))
BINARIES = [
    "libtq_backend.so",
    "libtq_kernels_cpu.so",
    "libtq_kernels_cuda.so",
    "libtq_torch.so",
    "libhwy.so.1",
    "tq-check-abi",
    next(file.name for file in PACKAGE.glob("_native.*.so")),
]
# Where the distribution has no compiler for it, there is none.
if (PACKAGE / "libtq_kernels_hip.so").exists() or "hip" in os.environ.get("TQ_REQUIRE_KERNELS", ""):
    BINARIES.append("libtq_kernels_hip.so")


def run_python(code: str, path: Path, **env: str) -> str:
    """Runs code in a new interpreter that sees `path` before anything else; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=path,
        env=os.environ | {"PYTHONPATH": str(path)} | env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed package in a folder that the build never knew."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(PACKAGE, folder / "tq_backend", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("name", BINARIES)
def test_binary_is_recorded_in_the_wheel(name: str):
    assert f"tq_backend/{name}" in {file.as_posix() for file in DISTRIBUTION.files or ()}
    assert (PACKAGE / name).is_file()


def test_every_python_file_of_the_source_is_installed_and_no_other():
    source = {
        f.relative_to(ROOT / "plugin").as_posix(): f.read_bytes() for f in (ROOT / "plugin/tq_backend").rglob("*.py")
    }
    files = [f for f in DISTRIBUTION.files or () if f.suffix == ".py"]
    assert {f.as_posix() for f in files} == set(source)
    old = [f.as_posix() for f in files if Path(str(f.locate())).read_bytes() != source[f.as_posix()]]
    assert not old, f"installed files differ from the source: {old}; run ci/setup.sh"


def test_version_has_one_source():
    project = re.search(r"project\(tq_backend VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert DISTRIBUTION.version == project[1]
    assert run_python("import tq_backend; print(tq_backend.__version__)", PACKAGE.parent) == project[1]
    report = json.loads(subprocess.run([PACKAGE / "tq-check-abi", "--json"], capture_output=True, check=False).stdout)
    assert report["build_id"].startswith(f"{project[1]}-")


def test_metadata():
    assert DISTRIBUTION.metadata["License-Expression"] == "Apache-2.0"
    assert DISTRIBUTION.metadata["Description"].startswith("# tq-backend")
    required = {re.split(r"[ <>=;]", line)[0] for line in DISTRIBUTION.requires or ()}
    assert required.isdisjoint({"torch", "vllm"}), "an engine brings its own torch; ours would replace it"


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("vllm.general_plugins", "tq_backend", "tq_backend.register:register"),
        ("vllm.platform_plugins", "tq_backend_cpu", "tq_backend.register:cpu_platform"),
        ("console_scripts", "tq", "tq_backend.cli.main:main"),
        ("console_scripts", "tq-check", "tq_backend.cli.check:main"),
    ],
)
def test_entry_point(group: str, name: str, value: str):
    (point,) = [p for p in DISTRIBUTION.entry_points if p.group == group and p.name == name]
    assert point.value == value
    assert callable(point.load())


def test_import_takes_neither_torch_nor_vllm(moved: Path):
    hide = (
        "import sys; sys.modules.update(torch=None, vllm=None)\n"
        "import tq_backend, tq_backend.register\n"
        "from tq_backend._library import native\n"
        "print(tq_backend.__file__, len(native().formats()))"
    )
    where, count = run_python(hide, moved).split()
    assert Path(where).is_relative_to(moved)
    assert int(count) >= 4


def test_moved_package_finds_its_own_libraries(moved: Path):
    done = subprocess.run(
        [moved / "tq_backend" / "tq-check-abi", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cpu = next(row for row in json.loads(done.stdout)["libraries"] if row["kind"] == "cpu")
    assert cpu["usable"], cpu
    code = (
        "from tq_backend._library import native; native().libraries()\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'tq_' in line or 'hwy' in line})"
    )
    loaded = {Path(path) for path in re.findall(r"'([^']+)'", run_python(code, moved))}
    assert {path.name for path in loaded} >= {"libtq_backend.so", "libtq_kernels_cpu.so", "libhwy.so.1"}
    assert all(path.is_relative_to(moved) for path in loaded), loaded


EXAMPLE = ROOT / "examples/c_engine"


def build_example(find: str, build: Path) -> subprocess.CompletedProcess:
    flags = ["-DCMAKE_C_FLAGS=-Wall -Wextra -Werror -pedantic", find]
    cmake = Path(sys.executable).parent / "cmake"
    subprocess.run([cmake, "-S", EXAMPLE, "-B", build, *flags], check=True, capture_output=True)
    return subprocess.run([cmake, "--build", build], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("how", ["tq_backend_DIR=cmake", "CMAKE_PREFIX_PATH="])
def test_an_engine_in_c_is_built_and_runs_on_the_package(moved: Path, tmp_path: Path, how: str):
    variable, folder = how.split("=")
    built = build_example(f"-D{variable}={moved / 'tq_backend' / folder}", tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    done = subprocess.run([tmp_path / "c_engine"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [float(x) for x in re.findall(r"largest difference from the reference (\S+)", done.stdout)]
    assert len(errors) == 2 and 0 < max(errors) < 1e-3
    linked = subprocess.run(["ldd", tmp_path / "c_engine"], capture_output=True, text=True, check=True).stdout
    assert f"libtq_backend.so => {moved}" in linked


def test_another_minor_version_is_not_taken(tmp_path: Path):
    project = "cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES C)\nfind_package(tq_backend {} REQUIRED)\n"
    codes = []
    for version in ("0.0", "0.1", "0.2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "CMakeLists.txt").write_text(project.format(version))
        command = [Path(sys.executable).parent / "cmake", "-S", version, "-B", f"b{version}"]
        command.append(f"-Dtq_backend_DIR={PACKAGE / 'cmake'}")
        codes.append(subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode)
    assert codes == [1, 0, 1]


def test_the_package_says_where_its_header_is(moved: Path):
    code = "import tq_backend; print(tq_backend.get_include()); print(tq_backend.get_cmake_dir())"
    include, cmake = run_python(code, moved).splitlines()
    assert (Path(include), Path(cmake)) == (moved / "tq_backend/include", moved / "tq_backend/cmake")
    assert (Path(include) / "tq_backend.h").read_bytes() == (ROOT / "csrc/include/tq_backend.h").read_bytes()
    for file in [*Path(include).iterdir(), *Path(cmake).iterdir()]:
        assert str(ROOT) not in file.read_text(), file


def test_a_source_tree_says_that_it_has_no_header():
    code = "import tq_backend\ntry: tq_backend.get_include()\nexcept FileNotFoundError as e: print(e)"
    assert "install the package with pip first" in run_python(code, ROOT / "plugin")


def test_the_readme_quotes_the_example_and_it_is_short():
    source = (EXAMPLE / "main.c").read_text().splitlines()
    assert len(source) < 150
    (block,) = re.findall(r"```c\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = iter([line.strip() for line in source])
    assert all(line in lines for line in block.splitlines()), "README.md quotes lines that are not in main.c"


@pytest.mark.parametrize("name", BINARIES)
def test_no_build_path_remains(name: str):
    dynamic = subprocess.run(["readelf", "-d", PACKAGE / name], capture_output=True, text=True, check=True).stdout
    paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
    assert paths == ([] if name == "libhwy.so.1" else ["$ORIGIN"])
    assert str(ROOT).encode() not in (PACKAGE / name).read_bytes()
