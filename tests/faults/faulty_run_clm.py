"""run_clm.py with one real signal to itself at an exact place: FAULT="place count rank signal whom [again]".

place: data, forward, evaluation, save or all_reduce. count: the n-th time. whom: the process, or its group. again: seconds
after which a second one follows.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import run_clm
from utils import arguments, corpus, errors


def place_fault() -> None:
    place, count, rank, name, whom, *again = os.environ["FAULT"].split()
    once = Path(os.environ["FAULT_DONE"])
    left = int(count)

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0 and os.environ.get("RANK", "0") == rank and not once.exists():
            once.touch()
            if whom == "group":  # by another process, as a scheduler would
                subprocess.Popen(["kill", "-s", name.removeprefix("SIG"), "--", f"-{os.getpgid(0)}"])
                time.sleep(0.5)
                return
            os.kill(os.getpid(), signal.Signals[name])
            for seconds in again:
                time.sleep(float(seconds))
                os.kill(os.getpid(), signal.Signals[name])

    def before(owner, attribute: str) -> None:
        original = getattr(owner, attribute)

        def struck(*arguments, **named):
            strike()
            return original(*arguments, **named)

        setattr(owner, attribute, struck)

    if place == "data":
        before(corpus, "load_text")
        return
    import torch.distributed
    from transformers import GPT2LMHeadModel

    from utils.trainer import LanguageModelingTrainer

    if place == "all_reduce":
        before(torch.distributed, "all_reduce")
    elif place == "save":
        before(LanguageModelingTrainer, "_save_optimizer_and_scheduler")
    elif place == "evaluation":
        before(LanguageModelingTrainer, "prediction_step")
    else:
        before(GPT2LMHeadModel, "forward")


def main() -> None:
    place_fault()
    run_clm.main()


if __name__ == "__main__":
    sys.argv[0] = "run_clm.py"
    errors.run(main, arguments.wants_traceback)
