#!/usr/bin/env python
"""Trains GPT, GPT-2 and other causal language models on text: each token is predicted from those before it."""

from utils import arguments, hub
from utils.data_arguments import CausalDataArguments
from utils.errors import run


def main() -> None:
    # What is asked for. Nothing heavy is imported before this is known to make sense.
    types = (arguments.ModelArguments, CausalDataArguments, arguments.LanguageModelingArguments)
    (model_args, data_args, args), notes = arguments.parse(types, description=__doc__)
    arguments.check_run(data_args, args)
    notes += hub.use_cache_if_unreachable(
        [model_args.model_name_or_path, model_args.tokenizer_name, data_args.dataset_name]
    )

    from transformers import AutoModelForCausalLM, set_seed

    from utils import corpus, log, model, output_folder, packing, tokenization, training
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
    config, tokenizer = model.load_config_and_tokenizer(text[splits[0]], model_args, args, claim.checkpoint)
    model.check_objective(config, "run_clm.py")
    block_size = packing.choose_block_size(data_args.block_size, tokenizer, config)
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    tokens = tokenization.tokenize_all(text, tokenizer, data_args, args)
    blocks = {split: packing.pack(tokens[split], block_size, split, limits[split]) for split in splits}
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
    results = training.train_and_evaluate(trainer, claim.checkpoint)
    training.publish(trainer, results, model_args, data_args, task="text-generation")


if __name__ == "__main__":
    run(main, arguments.wants_traceback)
