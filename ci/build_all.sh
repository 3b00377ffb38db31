#!/usr/bin/env bash
# Builds libtq_kernels_cuda.so from nothing for every architecture that a release has, strips it, and writes how long that took
# and how large it is to tests/bench/results/build_all.json. Not part of ci/test.sh, which builds for two architectures.
# Run ci/setup.sh first. The library is left in build-all/lib.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-tests/bench/results/build_all.json}

stage() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

[ -x .venv/bin/cmake ] || { echo "there is no .venv/bin/cmake: run ci/setup.sh first" >&2; exit 1; }
CUDACXX=$(bash ci/cuda.sh)
export CUDACXX PATH="$PWD/.venv/bin:$PATH"
unset TQ_CUDA_ARCHITECTURES

stage "configure"
rm -rf build-all
cmake -S . -B build-all -G Ninja -DCMAKE_BUILD_TYPE=Release -DTQ_BUILD_TESTS=OFF -DTQ_BUILD_PYTHON=OFF
architectures=$(sed -n 's/^TQ_CUDA_ARCHITECTURES:[A-Z]*=//p' build-all/CMakeCache.txt)
cmake --build build-all --target tq_core tq_backend

stage "build for $architectures"
began=$(date +%s.%N)
cmake --build build-all --target tq_kernels_cuda
ended=$(date +%s.%N)

stage "strip"
library=build-all/lib/libtq_kernels_cuda.so
built=$(stat -c %s "$library")
strip --strip-unneeded "$library"
bash ci/check_exports.sh build-all/lib

stage "results"
python - "$results" "$began" "$ended" "$built" "$(stat -c %s "$library")" "$architectures" "$("$CUDACXX" --version | sed -n 's/.*, V//p')" <<'END'
import sys
from pathlib import Path

from tq_backend.cli.results import Figure, write_results

path, began, ended, built, stripped, architectures, nvcc = sys.argv[1:]
sys.argv = ["bash", "ci/build_all.sh", *([path] if path != "tests/bench/results/build_all.json" else [])]
what = f"libtq_kernels_cuda.so, nvcc {nvcc}, {architectures.replace(';', ' ')}"
figures = [
    Figure(f"time to build {what}", round(float(ended) - float(began), 1), "s"),
    Figure(f"size of {what}", int(stripped), "bytes", baseline=f"before strip {built} bytes"),
]
for figure in figures:
    print(f"{figure.figure}: {figure.value} {figure.unit}")
write_results(Path(path), figures)
END
