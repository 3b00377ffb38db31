#!/usr/bin/env bash
# The C++ tests under clang's sanitizers: memory and undefined behaviour for all of them, data races for those with threads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

run() { # build folder, then ctest's arguments
  local folder=build/$1
  bash ci/sanitized_build.sh "$1"
  # At least one test, or a name that has changed would leave nothing to run.
  ctest --test-dir "$folder" --no-tests=error --output-on-failure -j "$(nproc)" "${@:2}"
}
# A limit of the address space, which TooManyThreads sets, leaves no room for a sanitizer's shadow memory.
# Allocations that must fail return NULL instead of ending the process.
ASAN_OPTIONS=allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 run asan -E TooManyThreads
# A child of a process with threads may go on, which is what tests of fork are about.
TSAN_OPTIONS=die_after_fork=0 run tsan -R '^(AttendCpu|StoreCpu|Calls|Fork)\.' -E 'RandomGrid|Sse4|TooManyThreads'
echo "sanitizers: clean"
