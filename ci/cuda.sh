#!/usr/bin/env bash
# Installs the CUDA compiler of ci/cuda-tools.txt into .venv/cuda and prints the path of nvcc, and nothing else, on stdout.
# Needs Python with venv, and g++; a CUDA toolkit or driver of the machine is neither needed nor used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOLS=ci/cuda-tools.txt
toolkit=$PWD/.venv/cuda/nvidia/cu13
nvcc=$toolkit/bin/nvcc

stage() { printf '\n== %s (%d s)\n' "$*" "$SECONDS" >&2; }

# The stamp lies in the folder that it vouches for, and holds a hash of what that was made from.
stamp=.venv/cuda/.stamp
made_from=$(cat "$TOOLS" ci/cuda.sh | sha256sum)
if [ ! -x "$nvcc" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$made_from" ]; then
  [ -x .venv/bin/python ] || { stage ".venv"; python3 -m venv .venv; }
  stage "CUDA compiler: $(grep nvcc "$TOOLS")"
  rm -rf .venv/cuda
  # In a folder of its own and without dependencies: torch has some of these wheels in .venv, at versions that it chose.
  .venv/bin/python -m pip install --disable-pip-version-check --no-deps --target .venv/cuda -r "$TOOLS" >&2
  ln -s lib "$toolkit/lib64" # nvcc links from lib64; the wheels have lib

  stage "CUDA compiler: a kernel compiles and links, with the static runtime of this toolkit"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo '#include <cuda_bf16.h>
        __global__ void one(__nv_bfloat16* out) { *out = __float2bfloat16(1); }
        extern "C" int run(__nv_bfloat16* out) { one<<<1, 1>>>(out); return cudaGetLastError(); }' >"$work/one.cu"
  "$nvcc" -std=c++20 -arch=sm_80 -cudart static -shared -Xcompiler -fPIC -Xlinker --no-undefined,--trace \
    -o "$work/one.so" "$work/one.cu" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  runtime=$(grep -m 1 'libcudart_static\.a' "$work/log" | sed 's/(.*//' || true)
  [ -n "$runtime" ] && [ "$(realpath "$runtime")" = "$toolkit/lib/libcudart_static.a" ] || {
    echo "nvcc linked the CUDA runtime '$runtime', not $toolkit/lib/libcudart_static.a" >&2
    exit 1
  }
  printf '%s' "$made_from" >"$stamp"
fi
echo "$nvcc"
