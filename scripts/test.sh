#!/usr/bin/env bash
# Runs all tests in .venv, which is made if it is missing. Arguments go to pytest: scripts/test.sh tests/test_amp.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/make_venv.sh requirements-test.txt)
# DeepSpeed lies beside the other packages: accelerate and transformers import it wherever they find it, which takes seconds.
deepspeed=.venv/deepspeed
if [[ ! -d $deepspeed ]] && ! "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$deepspeed" -r tests/requirements-deepspeed.txt; then
    rm -rf "$deepspeed"
    echo "no DeepSpeed: its tests will be skipped"
fi
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest -n 2 --dist worksteal "$@"
