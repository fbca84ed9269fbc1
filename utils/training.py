"""The last part of every script: train, evaluate, and leave the results for people and programs to read."""

import functools
import logging

from utils import device, model_card, output_folder, past_run, report, results_row
from utils.data_arguments import DataArguments
from utils.errors import UsageError, one_line
from utils.metrics import perplexity
from utils.model_arguments import ModelArguments
from utils.sharding import parameter_count
from utils.trainer import LanguageModelingTrainer
from utils.training_arguments import LanguageModelingArguments

logger = logging.getLogger(__name__)


def train_and_evaluate(trainer: LanguageModelingTrainer, checkpoint: str | None, figures: dict) -> dict:
    """Does what --do_train and --do_eval ask for, saves model and metrics, and returns all metrics.

    checkpoint: the folder to resume from. figures: of the training text, from packing.figures.
    """
    args: LanguageModelingArguments = trainer.args
    results: dict = {}
    if args.do_train:
        device.reset_peak_memory(args.device)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        try:
            metrics["train_samples"] = len(trainer.train_dataset)
        except TypeError:  # a stream
            metrics["train_samples"] = trainer.state.max_steps * trainer.get_total_train_batch_size(args)
        metrics |= trainer.throughput.metrics() | figures
        if trainer.stream_loader is not None:
            metrics["data_tokens"] = trainer.streamed_tokens()
            # Text becomes ids beside the training: what counts is how long that waited.
            metrics["data_seconds"] = round(trainer.throughput.whole.waiting, 3)
        metrics["train_peak_memory_bytes"] = device.peak_memory(args.device)
        trainer.log_metrics("train", metrics)
        if trainer.combined is not None and args.use_combine_grad:
            metrics["gradient_buffers"] = trainer.combined.gradient_buffers()
        trainer.save_metrics("train", metrics)
        results |= metrics
    if args.do_eval:
        device.empty_cache(args.device)  # batches of another size come now
        metrics = trainer.evaluate()
        metrics["eval_samples"] = trainer.evaluated_samples
        metrics["perplexity"] = perplexity(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results |= metrics
    trainer.save_state()
    if getattr(trainer.train_dataset, "epochs", 0) is None:  # of a stream by --max_steps: nobody knows how long it is
        results.pop("epoch", None)
    return results


def publish(
    trainer: LanguageModelingTrainer, results: dict, model: ModelArguments, data: DataArguments, task: str
) -> None:
    """Writes the results row, the model card and the report, pushes to the hub, and records the run as finished.

    task: the hub's name of what the model does, e.g. text-generation. Raises UsageError if pushing fails; all else is done.
    """
    args: LanguageModelingArguments = trainer.args
    row = results_row.cells(results, args.device, args.world_size, args.precision.level)
    source = past_run.text_source(vars(data))
    card: dict = {"finetuned_from": model.model_name_or_path, "tasks": task}
    if data.dataset_name is not None:
        card |= {"dataset": data.dataset_name, "dataset_args": data.dataset_config_name}
    facts = {
        "task": task,
        "kind": trainer.model.config.model_type,
        "parameters": parameter_count(trainer.model),
        "text": source,
        "precision": f"{args.precision.level} ({str(args.precision.dtype).removeprefix('torch.')})",
        "devices": row[0],
        "from_scratch": model.model_name_or_path is None,
    }
    trainer.complete_model_card = functools.partial(model_card.complete, args.output_dir, results, facts)
    trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        results_row.write_results(args.output_dir, results_row.table(row))
    refusal = _push(trainer, card) if args.push_to_hub else None
    if trainer.is_world_process_zero():
        output_folder.finish(args.output_dir)
        report.write_after_training(trainer, row, args.config_text)
        logger.info("results\n%s", results_row.table(row))
    if refusal is not None:
        raise refusal


def _push(trainer: LanguageModelingTrainer, card: dict) -> UsageError | None:
    """Pushes to the hub; returns why it could not."""
    try:
        trainer.push_to_hub(**card)
    except Exception as error:
        folder, name = trainer.args.output_dir, trainer.hub_model_id
        return UsageError(
            f"--push_to_hub: {one_line(error)[:300]}; the run is whole in {folder}, `hf upload {name} {folder}` pushes it",
            of_one_rank=True,
        )
    return None
