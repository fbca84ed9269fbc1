#!/usr/bin/env bash
# Runs tests and shows which lines of utils/ and the scripts none of them runs. Arguments go to pytest:
#   scripts/coverage.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/make_venv.sh requirements-test.txt)
exec "$python" -m pytest -n 2 --cov --cov-report=term-missing:skip-covered "$@"
