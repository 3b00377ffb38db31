#!/usr/bin/env bash
# Opt-in, CI does not run it: `tq eval` on real models, Gemma 3 270M (Gemma Terms of Use) and Qwen2.5-Coder 0.5B (Apache-2.0), and with
# BIG=1 Qwen2.5-Coder 1.5B (Apache-2.0). Downloads 0.7 GB, with BIG=1 1.8 GB, into TQ_REAL_MODELS (default ~/.cache/tq-backend/real_models)
# and keeps there what it makes of it. Run ci/setup.sh first. Writes OUT and a plot beside it.
# Environment, with defaults: MODELS (all that are there), TEXTS="prose code", WINDOWS=8, WINDOW=2048, FORMATS (fp8 and all of ours),
# LAYERS=default (the native layers that each format has by default; none; or numbers), OUT=tests/bench/results/real_models.json, and
# ARGS, more arguments of `tq eval`. For minutes: WINDOWS=2 FORMATS="fp8 turboquant_4bit_nc".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || { echo "there is no $python: run ci/setup.sh first" >&2; exit 1; }
export TQ_REAL_MODELS=${TQ_REAL_MODELS:-$HOME/.cache/tq-backend/real_models}
TEXTS=${TEXTS:-prose code} WINDOWS=${WINDOWS:-8} WINDOW=${WINDOW:-2048} LAYERS=${LAYERS:-default}
OUT=${OUT:-tests/bench/results/real_models.json}
big=()
[ "${BIG:-0}" = 0 ] || big=(--big)
"$python" ci/real_models/fetch.py "$TQ_REAL_MODELS" "${big[@]}"
[ -n "${MODELS:-}" ] || MODELS=$("$python" ci/real_models/fetch.py "$TQ_REAL_MODELS" "${big[@]}" --list)
ours=$("$python" -c 'from tq_backend._library import native; print(*[row["name"] for row in native().formats() if not row["test_only"]])')
FORMATS=${FORMATS:-fp8 $ours}
layers="--skip-layers $LAYERS"
[ "$LAYERS" != none ] || layers=

parts=()
for model in $MODELS; do
  part=$TQ_REAL_MODELS/results/$model.json
  rm -f "$part"
  # shellcheck disable=SC2086  # lists of words
  .venv/bin/tq eval --model "$TQ_REAL_MODELS/$model" --text $TEXTS --windows "$WINDOWS" --window "$WINDOW" --formats $FORMATS \
    $layers --json "$part" ${ARGS:-}
  parts+=("$part")
done
command="WINDOWS=$WINDOWS WINDOW=$WINDOW TEXTS=\"$TEXTS\" FORMATS=\"$FORMATS\" LAYERS=\"$LAYERS\" MODELS=\"${MODELS//$'\n'/ }\"${ARGS:+ ARGS=\"$ARGS\"} bash ci/real_models.sh"
"$python" ci/real_models/join.py "$OUT" "$command" "${parts[@]}"
.venv/bin/tq eval --plot "${OUT%.json}.svg" --from "$OUT"
