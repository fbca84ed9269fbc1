"""Runs a script as `python SCRIPT ...` does and writes down what it did on its device.

    python tests/npu/record_run.py FOLDER [--from_step N] run_clm.py --model_type gpt2 ...

FOLDER receives rank0.json, rank1.json, ..., one for each process: see witness.py. --from_step says from which training
step on the requests to the simulated device are in it; without it none are. The script itself is not changed.
"""

import os
import runpy
import sys


def main() -> None:
    folder, *words = sys.argv[1:]
    from_step = int(words[1]) if words[0] == "--from_step" else None
    sys.argv = words[2:] if from_step is not None else words
    sys.path.append(sys.path[0])
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))

    from utils import device  # noqa: F401  before transformers, as in the scripts

    import witness  # isort: skip

    witness.install(folder, from_step)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
