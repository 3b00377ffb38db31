#!/usr/bin/env bash
# Everything that is checked: set-up, lint, C++ tests, also under sanitizers, exported symbols, the ABI, a minute of fuzzing,
# Python and engine tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TQ_BUILD_TESTS=ON TQ_REQUIRE_KERNELS="${TQ_REQUIRE_KERNELS:-cpu cuda hip}"
bash ci/setup.sh
# The installed package came from build/ too; this adds the tests to it.
.venv/bin/cmake -S . -B build -DTQ_BUILD_TESTS=ON >/dev/null
.venv/bin/cmake --build build
bash ci/lint.sh
.venv/bin/ctest --test-dir build --output-on-failure -j "$(nproc)"
bash ci/check_exports.sh
bash ci/check_abi.sh
bash ci/sanitizers.sh
bash ci/fuzz.sh 60
.venv/bin/python -m pytest tests/python tests/engine
