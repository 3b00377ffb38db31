#!/usr/bin/env bash
# Builds the C++ tests and the fuzzers with clang's sanitizers: sanitized_build.sh asan|tsan, into build/asan (memory and
# undefined behaviour; the fuzzers too) or build/tsan (data races). gcc's sanitizers see null references that are not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" TQ_CUDA_ARCHITECTURES=OFF TQ_HIP_COMPILER=OFF

# The newest clang that has libFuzzer; ci/setup.sh with TQ_BUILD_TESTS=ON installs one.
runtime=$(compgen -G '/usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a' | sort -V | tail -1) || true
[ -n "$runtime" ] || { echo "there is no clang with libFuzzer under /usr/lib/llvm-*: TQ_BUILD_TESTS=ON bash ci/setup.sh" >&2; exit 1; }
clang=${runtime%%/lib/clang/*}/bin/clang

flags="-g1 -O2 -fno-omit-frame-pointer -fno-sanitize-recover=all"
case $1 in
  asan) flags+=" -fsanitize=address,undefined,fuzzer-no-link" fuzzers=ON targets=all ;;
  # Threads do not depend on the instruction set, and one compiles faster than four.
  tsan) flags+=" -fsanitize=thread -DHWY_COMPILE_ONLY_STATIC" fuzzers=OFF targets="tq_kernels_cpu_test tq_abi_test" ;;
esac
cmake -S . -B "build/$1" -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_C_COMPILER="$clang" -DCMAKE_CXX_COMPILER="$clang++" \
  -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" -DTQ_SANITIZED=ON -DTQ_BUILD_FUZZERS="$fuzzers" \
  -DTQ_BUILD_TESTS=ON -DTQ_BUILD_PYTHON=OFF >/dev/null
# shellcheck disable=SC2086  # several words
cmake --build "build/$1" --target $targets
