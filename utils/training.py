"""The last part of every script: train, evaluate, and leave the results for people and programs to read."""

import logging

from utils import device, output_folder, report
from utils.arguments import LanguageModelingArguments, ModelArguments
from utils.data_arguments import DataArguments
from utils.metrics import perplexity
from utils.trainer import LanguageModelingTrainer

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
    return results


def publish(
    trainer: LanguageModelingTrainer, results: dict, model: ModelArguments, data: DataArguments, task: str
) -> None:
    """Writes the model card, or pushes to the hub, writes and logs the results row, and records the run as finished.

    task: the hub's name of what the model does, e.g. text-generation.
    """
    card: dict = {"finetuned_from": model.model_name_or_path, "tasks": task}
    if data.dataset_name is not None:
        card |= {"dataset": data.dataset_name, "dataset_args": data.dataset_config_name}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        args = trainer.args
        table = report.results_table(results, args.device, args.world_size, args.precision.level)
        report.write_results(args.output_dir, table)
        logger.info("results\n%s", table)
        output_folder.finish(args.output_dir)
