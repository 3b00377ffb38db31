#!/usr/bin/env bash
# Writes what a caller of libtq_backend.so sees, the exported functions and every struct that they lead to, as libabigail
# (Debian's abigail-tools) reads it from the debug information: abi_dump.sh [FILE], by default the committed dump, which
# follows the header until 0.1.0 is released. Enumerators are not in it, because the fields that hold them are numbers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" TQ_CUDA_ARCHITECTURES=OFF TQ_HIP_COMPILER=OFF
cmake -S . -B build/abi -G Ninja -DCMAKE_BUILD_TYPE=Debug -DTQ_BUILD_TESTS=OFF -DTQ_BUILD_PYTHON=OFF >/dev/null
cmake --build build/abi --target tq_backend
abidw --headers-dir csrc/include --exported-interfaces-only --drop-private-types --no-show-locs --no-comp-dir-path \
  --no-corpus-path --no-elf-needed --no-architecture --out-file "${1:-tests/abi/tq_backend.abi}" build/abi/lib/libtq_backend.so
