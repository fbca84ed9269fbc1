"""What a run says while it works, and to whom."""

import logging
import sys

import datasets
import huggingface_hub
import transformers
from transformers import TrainingArguments


def set_up(args: TrainingArguments, notes: list[str]) -> None:
    """Log lines to stdout: all of the main process, warnings of the others and of the libraries; --log_level changes that.

    What moves is for a terminal: in a file or a pipe there are no progress bars. notes: said first, once, by the main
    process.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    level = args.get_process_log_level()
    ours = logging.INFO if args.should_log and args.log_level == "passive" else level
    for name in ("utils", "__main__"):
        logging.getLogger(name).setLevel(ours)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    # What its readers say of a damaged file, an error of ours says with the place in it.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL if level > logging.DEBUG else level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    for library in (datasets, huggingface_hub):  # they have handlers of their own: each line would come twice
        library.utils.logging.disable_propagation()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if args.process_index == 0:
        for note in notes:
            logging.getLogger("utils").warning(note)
