#!/usr/bin/env bash
# Puts the built package, with entry points and a Python 3.12 module, into the folder OUT for a GPU machine without a compiler:
#   bash ci/gpu_payload.sh [OUT]                    (default build-gpu, which git ignores)
#   PYTHONPATH=OUT python3.12 tests/bench/gpu_engine.py
# Needs a build in build/ (another: TQ_BUILD_DIR) and a Python 3.12 with its headers (PYTHON312, else pyenv's, else python3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-build-gpu}
build=${TQ_BUILD_DIR:-build}

if [ -z "${PYTHON312:-}" ]; then
  PYTHON312=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python 2>/dev/null | tail -n 1 || true)
fi
PYTHON312=${PYTHON312:-python3.12}
"$PYTHON312" -c 'import sys; assert sys.version_info[:2] == (3, 12), f"{sys.executable} is {sys.version}; it must be 3.12"'

cached() { sed -n "s/^$1:[A-Z]*=//p" "$build/CMakeCache.txt"; }
cmake=$(cached CMAKE_COMMAND)
pybind=$(cached pybind11_DIR) # of a build with the Python module
[ -n "$pybind" ] || pybind=$(.venv/bin/python -c 'import pybind11; print(pybind11.get_cmake_dir())' 2>/dev/null || true)
pybind=${pybind%/share/cmake/pybind11}/include # of an installed Python package; Debian's headers are in /usr/include

mkdir -p "$out"
rm -rf "$out/tq_backend" "$out"/tq_backend-*.dist-info
"$cmake" --build "$build"
"$cmake" --install "$build" --prefix "$out/tq_backend" --strip >/dev/null
rm -f "$out"/tq_backend/_native.*.so
[ -f "$out/tq_backend/libtq_torch.so" ] || { echo "$build was made without TQ_TORCH_DIR, so no LibTorch ops" >&2; exit 1; }
[ -f "$out/tq_backend/libtq_kernels_cuda.so" ] || echo "no CUDA kernels in $build: the plugin will decline on a GPU" >&2

module=$out/tq_backend/_native$("$PYTHON312" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
includes=(-Icsrc -Icsrc/include -isystem "$("$PYTHON312" -c 'import sysconfig; print(sysconfig.get_path("include"))')")
[ ! -d "$pybind" ] || includes+=(-isystem "$pybind")
"$(cached CMAKE_CXX_COMPILER)" -std=c++20 -O2 -DNDEBUG -fPIC -fvisibility=hidden -ffile-prefix-map="$PWD"=. "${includes[@]}" \
  -shared -s -o "$module" csrc/python/native.cc "$out/tq_backend/libtq_backend.so" -Wl,-rpath,'$ORIGIN'

"$PYTHON312" - "$out" <<'PY'
"""The Python half: sources, and the metadata by which vLLM finds the entry points."""
import re
import shutil
import sys
import tomllib
from pathlib import Path

out = Path(sys.argv[1])
shutil.copytree("plugin/tq_backend", out / "tq_backend", dirs_exist_ok=True, ignore=lambda folder, names: [
    name for name in names if not name.endswith(".py") and not (Path(folder) / name).is_dir() or name == "__pycache__"])
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
version = re.search(r"project\(tq_backend VERSION ([0-9.]+)", Path("CMakeLists.txt").read_text())[1]
info = out / f"tq_backend-{version}.dist-info"
info.mkdir()
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
groups = {"console_scripts": project["scripts"], **project["entry-points"]}
(info / "entry_points.txt").write_text("".join(
    f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()) for group, points in groups.items()))
PY

PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$out "$PYTHON312" -c '
import tq_backend
from tq_backend._library import native
print("tq-backend", tq_backend.__version__, "build", native().build_id(), "for Python 3.12")
for row in native().libraries():
    print(" ", row["kind"], "kernels:", row["reason"])'
du -sh "$out"
