#!/usr/bin/env bash
# Runs the self-test's HIP kernels, as compiled, in tinygrad's emulator of AMD instructions:
#   bash tests/emulator/run.sh TINYGRAD TARGET [BUILD]
# TINYGRAD: a checkout of its repository (the PyPI package lacks the emulator) with emulator.patch applied (patch -p1); TARGET:
# gfx1100, gfx1201, gfx942 or gfx950; BUILD: a build with HIP kernels (default build). About two minutes for waves of 32.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tinygrad=${1:?usage: run.sh TINYGRAD TARGET [BUILD]} target=${2:?usage: run.sh TINYGRAD TARGET [BUILD]} build=${3:-build}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$build/generated/kernels.hipfb
name=$(clang-offload-bundler-22 --list --type=o --input="$bundle" | grep -- "-$target\$")
clang-offload-bundler-22 --unbundle --type=o --input="$bundle" --targets="$name" --output="$work/code.o"
g++ -shared -fPIC -O1 -Itests $(/usr/bin/python3-config --includes) tests/emulator/runtime.cc -o "$work/libamdhip64.so" \
  $(/usr/bin/python3-config --ldflags --embed) # Debian's, of python3-dev: a shared libpython
ln -s "$(command -v clang-22)" "$work/clang" # the emulator compiles what it runs
PATH="$work:$PATH" DEV=CPU PYTHONPATH="$tinygrad:tests/emulator" TQ_HIP_LIBRARY="$work/libamdhip64.so" \
  TQ_EMULATOR_TARGET="$target" TQ_EMULATOR_CODE="$work/code.o" "$build/bin/tq-check-abi" --self-test=hip "$build/lib/libtq_backend.so"
