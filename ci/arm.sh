#!/usr/bin/env bash
# Compiles the CPU kernels and their tests for 64-bit Arm and runs them in qemu's user-mode emulation: arithmetic, not speed.
# Not part of ci/test.sh: five minutes of emulation. Debian 12; fetches Arm's Highway and GoogleTest into a scratch folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

as_root apt-get install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
as_root dpkg --add-architecture arm64
as_root apt-get update -qq
(cd "$work" && apt-get download libhwy1:arm64 libhwy-dev:arm64 libgtest-dev:arm64 && for f in *.deb; do dpkg -x "$f" root; done)
as_root dpkg --remove-architecture arm64

mkdir -p "$work/generated" "$work/include"
echo 'namespace tq { inline constexpr char kBuildId[] = "arm-test"; }' >"$work/generated/build_id.h"
ln -s "$work/root/usr/include/hwy" "$work/root/usr/include/gtest" "$work/include/"
lib=$work/root/usr/lib/aarch64-linux-gnu
cxx=(aarch64-linux-gnu-g++ -std=c++20 -O2 -DNDEBUG -fPIC -ffp-contract=off -fvisibility=hidden -Icsrc -Icsrc/include -I"$work/generated" -isystem "$work/include")
core=(csrc/codec/{format,float_bits,lloyd_max,reference}.cc csrc/layout/reference_page.cc)
kernels=(csrc/kernels/cpu/{api,attend,store,thread_pool}.cc csrc/kernels/cpu/arch/{attend,store}_task.cc)
"${cxx[@]}" -shared -o "$work/libtq_kernels_cpu.so" "${kernels[@]}" "${core[@]}" "$lib/libhwy.so.1" -lpthread
"${cxx[@]}" -DTQ_KERNELS_CPU_PATH="\"$work/libtq_kernels_cpu.so\"" -Itests/cpp -o "$work/tests" \
  tests/cpp/{attend,store}_cpu_test.cc "${core[@]}" "$lib/libhwy.so.1" "$lib/libgtest.a" "$lib/libgtest_main.a" -ldl -lpthread
qemu-aarch64 -L /usr/aarch64-linux-gnu -E LD_LIBRARY_PATH="$lib" "$work/tests"
