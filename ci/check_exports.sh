#!/usr/bin/env bash
# The libraries export exactly their documented symbols, need nothing that another machine may lack, and look for others
# beside themselves only.
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
# Programs of the build tree too: an empty or relative entry of a RUNPATH is the working directory of whoever runs them.
bin=${2:-build/bin}
for file in "$lib"/*.so "$bin"/*; do
  while read -r entry; do
    case "$entry" in
      '$ORIGIN' | '$ORIGIN/../lib') ;;
      *) echo "$file looks for libraries in '$entry'; it may in \$ORIGIN and \$ORIGIN/../lib" >&2; exit 1 ;;
    esac
  done < <(readelf -d "$file" | sed -nE 's/.*\((RUNPATH|RPATH)\).*\[(.*)\]/\2/p' | sed 's/$/:/; s/:/\n/g' | sed '$d')
done
echo "exports: as documented"
