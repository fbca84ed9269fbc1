#!/usr/bin/env bash
# Runs all tests in .venv, which is made if it is missing. Arguments go to pytest: scripts/test.sh tests/test_amp.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/make_venv.sh requirements-test.txt)
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest -n 2 --dist worksteal "$@"
