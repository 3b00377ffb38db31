#!/usr/bin/env bash
# The main job on a fresh machine: sets everything up, then a real vLLM on the CPU serves a small model from bf16 and from each
# TurboQuant cache, and one table compares them. Also written: build/demo.json, build/demo.png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/setup.sh
exec .venv/bin/python ci/demo.py "$@"
