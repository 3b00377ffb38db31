#!/usr/bin/env bash
# Formatting, static checks and the include layering, with the tools of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
mapfile -t sources < <(find csrc hip tests examples \( -name '*.c' -o -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.hip' \) -not -path 'tests/abi/headers/*' | LC_ALL=C sort)
$bin/clang-format --dry-run -Werror "${sources[@]}"
$bin/ruff check setup.py plugin ci tests
$bin/ruff format --check setup.py plugin ci tests
$bin/python ci/check_includes.py
$bin/python ci/check_lanes.py
# clang-tidy reads build/compile_commands.json; SIMD files are left out, which Highway compiles once per instruction set.
# It sees no .cu file, and the CUDA library's .cc files only where the build found a CUDA compiler and so the headers.
leave=(-path '*/arch/*' -o -path 'csrc/torch/*' -o -path 'csrc/python/*')
grep -q '/csrc/kernels/cuda/' build/compile_commands.json || leave+=(-o -path 'csrc/kernels/cuda/*')
grep -q '/hip/api.cc' build/compile_commands.json || leave+=(-o -path 'hip/*')
mapfile -t host < <(find csrc hip -name '*.cc' -not \( "${leave[@]}" \) | LC_ALL=C sort)
printf '%s\n' "${host[@]}" | xargs -P "$(nproc)" -n 1 $bin/clang-tidy -p build --quiet
echo "lint: clean"
