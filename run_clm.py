#!/usr/bin/env python
"""Trains GPT, GPT-2 and other causal language models on text: each token is predicted from those before it."""

import logging

from utils import arguments, hub
from utils.errors import run

logger = logging.getLogger("utils.run_clm")


def main() -> None:
    # What is asked for. Nothing heavy is imported before this is known to make sense.
    types = (arguments.ModelArguments, arguments.DataArguments, arguments.LanguageModelingArguments)
    (model_args, data_args, args), notes = arguments.parse(types, description=__doc__)
    arguments.check_run(data_args, args)
    notes += hub.use_cache_if_unreachable(
        [model_args.model_name_or_path, model_args.tokenizer_name, data_args.dataset_name]
    )

    from transformers import AutoModelForCausalLM, set_seed

    from utils import corpus, log, model, output_folder, packing, report, tokenization
    from utils.metrics import perplexity
    from utils.objectives import causal
    from utils.trainer import LanguageModelingTrainer

    log.set_up(args, notes)

    # The output folder: new, an unfinished run to go on with, or a finished one.
    wanted = arguments.snapshot((model_args, data_args, args))
    claim = output_folder.claim_for_all(args, "run_clm.py", wanted)
    if claim.verdict == "finished":
        return

    # Text, tokenizer, blocks.
    splits = [split for split, used in (("train", args.do_train), ("validation", args.do_eval)) if used]
    text = corpus.load_text(data_args, splits, model_args.cache_dir, model_args.token)
    config = model.load_config(model_args)
    tokenizer = model.load_tokenizer(model_args)
    if tokenizer is None:
        tokenizer = model.train_tokenizer(text[splits[0]], model_args, config, args)
    model.check_vocabulary(tokenizer, config)
    block_size = packing.choose_block_size(data_args.block_size, tokenizer, config)
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    blocks = {}
    for split in splits:
        with args.main_process_first(desc="tokenizing"):
            tokens = tokenization.tokenize(
                text[split], tokenizer, data_args.preprocessing_num_workers, not data_args.overwrite_cache
            )
        if data_args.streaming:
            blocks[split] = packing.StreamedBlocks(tokens, block_size, limits[split])
        else:
            blocks[split] = packing.pack(tokens, block_size, split).head(limits[split])
    if args.process_index == 0:
        output_folder.begin(args.output_dir, "run_clm.py", wanted, args.overwrite_output_dir)

    # Model and trainer.
    set_seed(args.seed)
    trainer = LanguageModelingTrainer(
        model=model.load_model(AutoModelForCausalLM, model_args, config),
        args=args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=causal.collate,
        token_sums=causal.token_sums,
    )

    # Train, evaluate, report.
    results: dict = {}
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=claim.checkpoint).metrics
        trainer.save_model()
        seen = trainer.state.max_steps * trainer.get_total_train_batch_size(args)
        metrics["train_samples"] = seen if data_args.streaming else len(blocks["train"])
        metrics |= trainer.throughput.metrics()
        trainer.log_metrics("train", metrics)
        if args.use_combine_grad:
            metrics["gradient_buffers"] = trainer.combined.gradient_buffers()
        trainer.save_metrics("train", metrics)
        results |= metrics
    if args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = trainer.evaluated_samples
        metrics["perplexity"] = perplexity(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results |= metrics
    trainer.save_state()

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation"}
    card |= (
        {"dataset": data_args.dataset_name, "dataset_args": data_args.dataset_config_name}
        if data_args.dataset_name
        else {}
    )
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        table = report.results_table(results, args.device, args.world_size, args.precision.level)
        report.write_results(args.output_dir, table)
        logger.info("results\n%s", table)
        output_folder.finish(args.output_dir)


if __name__ == "__main__":
    run(main, arguments.wants_traceback)
