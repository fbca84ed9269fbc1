"""Runs a script under DeepSpeed, less what that would compile first.

torchrun --nproc_per_node=2 tests/deepspeed_script.py run_clm.py FLAG...
"""

import runpy
import sys
from pathlib import Path


def build_no_operators() -> None:
    """On a CPU DeepSpeed compiles one for the processes of a machine to talk by, for a minute; gloo does as well."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    build_no_operators()
    del sys.argv[0]
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
