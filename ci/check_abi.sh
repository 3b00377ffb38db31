#!/usr/bin/env bash
# The library's structs and functions are those of the committed dump, so that a layout changes by intention only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/abi_dump.sh build/abi.now
# Without the structs behind the function table the comparison would always hold.
for type in TqApi TqLayerDesc TqAttendArgs TqPlanSummary; do
  grep -q "<class-decl name='$type' size-in-bits" build/abi.now || { echo "the dump lacks $type" >&2; exit 1; }
done
abidiff tests/abi/tq_backend.abi build/abi.now || {
  echo "the ABI differs from tests/abi/tq_backend.abi; if that is meant, run ci/abi_dump.sh and commit the dump" >&2
  exit 1
}
echo "ABI: as committed"
