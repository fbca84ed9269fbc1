"""run_clm.py whose ranks freeze: FREEZE="rank:step ..." stops each of them (SIGSTOP) once, in that step.

FREEZE_NOTES is a folder for files <rank>:<step>, each of which says that this has been.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import run_clm
from utils import arguments, errors


def freeze() -> None:
    from utils.trainer import LanguageModelingTrainer

    train_on = LanguageModelingTrainer.training_step

    def training_step(trainer, *words, **named):
        place = f"{os.environ.get('RANK', '0')}:{trainer.state.global_step + 1}"
        note = Path(os.environ["FREEZE_NOTES"], place)
        if place in os.environ["FREEZE"].split() and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return train_on(trainer, *words, **named)

    LanguageModelingTrainer.training_step = training_step


if __name__ == "__main__":
    freeze()
    sys.argv[0] = "run_clm.py"
    errors.run(run_clm.main, arguments.wants_traceback)
