# Sourced by launch.sh and verify_npu.sh, which use what it sets: which Python, and whether this machine has NPUs.
#   root    the project's folder, set before
#   python  the interpreter: PYTHON, or that of an activated environment, .venv's, or python3
#   npu_is_here  yes or no
# shellcheck shell=bash disable=SC2034,SC2154

if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -n ${VIRTUAL_ENV:-} || ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    python=python
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
if ! command -v "$python" >/dev/null; then
    echo "$(basename "$0"): error: PYTHON $python: no such program" >&2
    exit 2
fi

npu_is_here=no
for node in /dev/davinci[0-9]*; do
    if [[ -e $node ]]; then
        npu_is_here=yes
    fi
done
