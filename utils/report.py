"""report.html: what a run did, on one page that opens anywhere. Several runs are compared by

python -m utils.report FOLDER FOLDER ... [--output comparison.html]

With one folder its report is written anew.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

from utils import past_run
from utils.errors import UsageError, leave, one_line

logger = logging.getLogger(__name__)

PAGE = "report.html"


def record(trainer, row: list[str], yaml: str) -> dict:
    """What a report needs beside what other files of the output folder have; JSON types only.

    trainer: a LanguageModelingTrainer after its run. row: the results row's cells. yaml: the run as a config file.
    """
    from utils import device, environment, predictions
    from utils.sharding import parameter_count

    args, config = trainer.args, trainer.model.config
    script, argv = environment.script_words()
    try:
        samples = predictions.samples(trainer)
    except Exception as error:  # of whatever a model may do that it never did in training
        logger.warning("%s shows no predictions: %s", PAGE, one_line(error)[:200])
        samples = []
    local = device.local_process_count()
    return {
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "command": environment.command(script, argv, args.world_size, local),
        "folder": os.getcwd(),
        "yaml": yaml,
        "row": row,
        "environment": environment.describe(args.device, args.world_size),
        "model": {
            "kind": config.model_type,
            "parameters": parameter_count(trainer.model),
            "vocabulary": config.vocab_size,
            "precision": f"{args.precision.level}, {str(args.precision.dtype).removeprefix('torch.')}",
            "combined gradients": bool(args.use_combine_grad),
            "batch": trainer.get_total_train_batch_size(args),
            "steps": trainer.state.global_step,
        },
        "samples": samples,
        "sample_split": "validation" if trainer.eval_dataset is not None else "training",
    }


def write(folder: str | Path) -> Path:
    """Writes <folder>/report.html from what the run has left there, and returns its path. Raises UsageError, ImportError."""
    from utils import report_page

    path = Path(folder) / PAGE
    _replace(path, report_page.of_run(past_run.read(folder)))
    return path


def write_after_training(trainer, row: list[str], yaml: str) -> None:
    """Writes report.json and report.html into the run's output folder. A failure is one warning: the run has been done."""
    folder = Path(trainer.args.output_dir)
    try:
        content = json.dumps(record(trainer, row, yaml), indent=2, ensure_ascii=False)
        _replace(folder / past_run.REPORT_FILE, content + "\n")
        logger.info("report: %s", write(folder))
    except Exception as error:
        logger.warning("%s is not written: %s", folder / PAGE, one_line(error)[:300])


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="output folder of a run")
    parser.add_argument(
        "--output", default="comparison.html", metavar="FILE", help="the comparison (default: %(default)s)"
    )
    named = parser.parse_args()
    if len(named.folders) == 1:
        print(write(named.folders[0]))
        return
    from utils import report_page

    try:
        _replace(Path(named.output), report_page.of_comparison([past_run.read(folder) for folder in named.folders]))
    except OSError as error:
        raise UsageError(f"--output {named.output}: cannot be written: {error.strerror}") from error
    print(named.output)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.argv[0] = "utils.report"
        leave(error)
