#!/usr/bin/env bash
# Trains on one card for 3 epochs, then evaluates: the accuracy run.
#   bash scripts/train_full_1p.sh clm|mlm|plm [--data_path FOLDER] [flags of run_*.py]
# scripts/launch.sh does the work; --help lists what it takes.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" full 1 "$@"
