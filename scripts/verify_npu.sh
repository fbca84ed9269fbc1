#!/usr/bin/env bash
# Checks on an Ascend NPU what cannot be checked without one, and writes a report to send back:
#   bash scripts/verify_npu.sh
# The environment, losses beside the CPU's, the results rows of 1 and of 8 cards beside the published ones, and the
# profile of one step. --help lists its options; without an NPU it says what it could not check.
# It ends with 0: all is well; 1: something is wrong; 3: nothing is wrong, but not all could be checked.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
if [[ $npu_is_here == yes ]]; then
    # shellcheck source=scripts/env_npu.sh
    source "$root/scripts/env_npu.sh"
fi
export PYTHON=$python
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m utils.verify_npu "$@"
