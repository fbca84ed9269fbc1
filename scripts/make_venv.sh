#!/usr/bin/env bash
# Makes .venv at the project's root with what a requirements file names, unless it has that already; prints its python.
#   scripts/make_venv.sh requirements.txt
# PYTHON=python3.12 chooses the interpreter; it must be 3.11 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:?name a requirements file}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "scripts/make_venv.sh: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3" >&2
    exit 2
}

# The stamp holds the requirements that are installed: a changed file installs again, an unchanged one costs nothing.
stamp=.venv/.installed-$requirements
if ! cat requirements*.txt | cmp -s - "$stamp" || ! .venv/bin/python -c '' 2>/dev/null; then
    if ! .venv/bin/python -c '' 2>/dev/null; then
        python=$(find_python)
        echo "making .venv with $("$python" --version)" >&2
        "$python" -m venv --clear .venv >&2
    fi
    echo "installing $requirements into .venv" >&2
    # torch first: named alone its pinned build is taken as it is, before anything else can ask for another one.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" >&2
    cat requirements*.txt > "$stamp"
fi
echo "$PWD/.venv/bin/python"
