#!/usr/bin/env bash
# Trains on eight cards for 3 epochs, then evaluates: the accuracy run.
#   bash scripts/train_full_8p.sh clm|mlm|plm [--nproc N] [--data_path FOLDER] [flags of run_*.py]
# scripts/launch.sh does the work; --help lists what it takes.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" full 8 "$@"
