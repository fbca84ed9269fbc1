"""One of the scripts, with one real signal to itself at an exact place: FAULT="place count rank signal whom [again]".

    python tests/faults/faulty_script.py run_clm.py --do_train ...

place: data, forward, evaluation, save, background (the thread of --async_save flushes a file) or all_reduce. count: the
n-th time. whom: the process, or its group. again: seconds after which a second one follows. FAULT="gradient count rank
value" puts a value into one gradient instead. FAULT_DONE: a file that says that it has come.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import arguments, checkpoint, corpus, errors

MODELS = {"run_clm": "GPT2LMHeadModel", "run_mlm": "BertForMaskedLM", "run_plm": "XLNetLMHeadModel"}
SCRIPT = Path(sys.argv.pop(1)).stem


def place_fault() -> None:
    place, count, rank, *rest = os.environ["FAULT"].split()
    if place == "gradient":
        spoil_gradient(int(count), rank, float(rest[0]))
        return
    name, whom, *again = rest
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

    def before(owner, attribute: str, counts=lambda owner: True) -> None:
        original = getattr(owner, attribute)

        def struck(*arguments, **named):
            if counts(arguments[0]):
                strike()
            return original(*arguments, **named)

        setattr(owner, attribute, struck)

    if place == "data":
        before(corpus, "load_text")
        return
    import torch.distributed
    import transformers

    from utils.trainer import LanguageModelingTrainer

    if place == "all_reduce":
        before(torch.distributed, "all_reduce")
    elif place == "save":
        before(LanguageModelingTrainer, "_save_optimizer_and_scheduler")
    elif place == "evaluation":
        before(LanguageModelingTrainer, "prediction_step")
    elif place == "background":
        before(checkpoint, "_flush")
    else:
        # Not those by which the set-up learns what the model does.
        before(getattr(transformers, MODELS[SCRIPT]), "forward", counts=lambda model: model.training)


def spoil_gradient(count: int, rank: str, value: float) -> None:
    """The n-th gradient of one parameter on one rank; and a line at the end by which ranks can be compared."""
    from utils import training
    from utils.trainer import LanguageModelingTrainer

    train = LanguageModelingTrainer.train
    seen = 0

    def spoil(gradient):
        nonlocal seen
        seen += 1
        if seen == count and os.environ.get("RANK", "0") == rank:
            gradient = gradient.clone()
            gradient.view(-1)[7] = value
        return gradient

    def spoiled(trainer, *arguments, **named):
        trainer.model.transformer.h[0].mlp.c_fc.weight.register_hook(spoil)
        output = train(trainer, *arguments, **named)
        print("weights", sum(weight.double().sum().item() for weight in trainer.model.parameters()))
        return output

    training.LanguageModelingTrainer.train = spoiled


def main() -> None:
    script = importlib.import_module(SCRIPT)
    place_fault()
    script.main()


if __name__ == "__main__":
    sys.argv[0] = f"{SCRIPT}.py"
    errors.run(main, arguments.wants_traceback)
