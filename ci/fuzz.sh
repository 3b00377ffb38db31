#!/usr/bin/env bash
# Fuzzes the planner and the ABI side by side, so many seconds each, with clang's address and undefined-behaviour sanitizers:
# fuzz.sh SECONDS [--json FILE]. FILE (tests/bench/results/fuzz.json) receives how many inputs were run. What was found
# before is kept in build/fuzz/corpus; an input that fails is written to build/fuzz, and its command line runs it alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:?"usage: ci/fuzz.sh SECONDS [--json FILE]"}
json=${3:-}
bash ci/sanitized_build.sh asan

declare -A pid
for name in planner abi; do
  mkdir -p "build/fuzz/corpus/$name"
  "build/asan/bin/tq_${name}_fuzz" -max_total_time="$seconds" -max_len=1024 -timeout=60 -reload=0 -print_final_stats=1 \
    -artifact_prefix="build/fuzz/$name-" "build/fuzz/corpus/$name" >"build/fuzz/$name.log" 2>&1 &
  pid[$name]=$!
done
failed=0
for name in planner abi; do
  if ! wait "${pid[$name]}"; then
    grep -vE '^#|NEW_FUNC' "build/fuzz/$name.log" >&2
    failed=1
  fi
  sed -n "s/^stat::number_of_executed_units: */$name: inputs run: /p" "build/fuzz/$name.log"
done
[ "$failed" = 0 ] || exit 1
if [ -n "$json" ]; then .venv/bin/python tests/fuzz/record.py "$seconds" --json "$json"; fi
