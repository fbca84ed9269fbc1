#!/usr/bin/env bash
# Trains on one card for 200 steps, without evaluation: the performance run.
#   bash scripts/train_performance_1p.sh clm|mlm|plm [--data_path FOLDER] [flags of run_*.py]
# scripts/launch.sh does the work; --help lists what it takes.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" performance 1 "$@"
