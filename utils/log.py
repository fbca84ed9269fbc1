"""What a run says while it works, and to whom."""

import logging
import sys

import datasets
import transformers
from transformers import TrainingArguments


def set_up(args: TrainingArguments, notes: list[str]) -> None:
    """Log lines to stdout: all of the main process, warnings of the others; --log_level changes that.

    notes: said first, once, by the main process.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    if args.should_log:
        transformers.utils.logging.set_verbosity_info()  # what a passive --log_level means here
    level = args.get_process_log_level()
    for name in ("utils", "__main__"):
        logging.getLogger(name).setLevel(level)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    if args.process_index == 0:
        for note in notes:
            logging.getLogger("utils").warning(note)
