#!/usr/bin/env bash
# Type a prompt, see what a trained model says; offline, on the CPU. DIR is a run's output folder.
#   bash scripts/try_it.sh DIR
# GPT and GPT-2 go on with the text; BERT and its like, and XLNet, fill in [MASK] (or <mask>). An empty line ends it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
export HF_HUB_OFFLINE=1
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m utils.try_it "$@"
