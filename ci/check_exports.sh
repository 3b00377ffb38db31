#!/usr/bin/env bash
# The libraries export exactly their documented symbols and need nothing that another machine may lack.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lib=${1:-build/lib}
check() { # name, expected symbols
  local got
  got=$(nm -D --defined-only "$lib/$1" | awk '{print $3}' | LC_ALL=C sort | tr '\n' ' ')
  [ "$got" = "$2 " ] || { echo "$1 exports '$got'; it must export '$2'" >&2; exit 1; }
  if readelf -d "$lib/$1" | grep -E 'NEEDED.*(libcuda|libcudart|libamdhip64|libtorch|libpython)'; then
    echo "$1 needs a library that only some machines have" >&2; exit 1
  fi
}
check libtq_backend.so "tq_abi_version tq_get_api"
for kernels in "$lib"/libtq_kernels_*.so; do check "$(basename "$kernels")" "tq_kernels_get_api"; done
echo "exports: as documented"
