#!/usr/bin/env python
"""Trains GPT, GPT-2 and other causal language models on text: each token is predicted from those before it."""

from utils import arguments, garbage_collection
from utils.data_arguments import CausalDataArguments
from utils.errors import run


def main() -> None:
    # What is asked for. Nothing heavy is imported before this is known to make sense.
    model_args, data_args, args, notes = arguments.parse_run(CausalDataArguments, __doc__)

    with garbage_collection.last_imports():
        from transformers import AutoModelForCausalLM

        from utils import (
            corpus,
            cpu_dropout,
            device,
            document_packing,
            dry_run,
            elastic,
            host_memory,
            log,
            model,
            output_folder,
            packing,
            stream_packing,
            training,
        )
        from utils.objectives import causal
        from utils.trainer import LanguageModelingTrainer

    log.set_up(args, notes)

    # The output folder: new, an unfinished run to go on with, or a finished one.
    wanted = arguments.snapshot((model_args, data_args, args))
    claim = output_folder.claim_for_all(args, "run_clm.py", wanted)
    if claim.verdict == "finished":
        return
    elastic.keep_global_batch(args, claim.checkpoint)

    # Text, tokenizer, blocks.
    text = corpus.load_text(data_args, args.splits, model_args.cache_dir, model_args.token, args.seed)
    first_text = text[args.splits[0]]
    config, tokenizer = model.load_config_and_tokenizer("run_clm.py", first_text, model_args, claim.checkpoint)
    block_size = packing.choose_block_size(data_args.block_size, tokenizer, config)
    make_samples = stream_packing.make_samples if data_args.streaming else packing.make_samples
    blocks, figures = make_samples(text, tokenizer, block_size, data_args, args, model_args.cache_dir)

    # Model and trainer.
    host_memory.keep_freed_memory(args.device.type)
    device.seed_all(args.seed)
    network = model.load_model(AutoModelForCausalLM, model_args, config, args)
    causal.expect_whole_blocks()
    collate = causal.collate
    if data_args.packing == "documents":
        varlen = document_packing.keep_documents_apart(network, causal=True)
        collate = causal.DocumentCollator(block_size, tokenizer.pad_token_id or 0, varlen)
    elif data_args.keep_remainder:
        collate = causal.PaddedCollator(block_size, tokenizer.pad_token_id or 0)
    cpu_dropout.draw_few_bits(network, args.device.type)
    whole_logits = data_args.full_head or args.layers_are_patched
    in_chunks = not whole_logits and causal.predict_in_chunks(network, args.label_smoothing_factor)
    trainer = LanguageModelingTrainer(
        model=network,
        args=args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=collate,
        token_sums=causal.token_sums,
        head_gives_sums=in_chunks,
    )

    # Train, evaluate, report; or say what that would be.
    if args.dry_run:
        return dry_run.show(trainer, figures, claim.checkpoint)
    output_folder.begin_for_all(args, "run_clm.py", wanted, figures)
    results = training.train_and_evaluate(trainer, claim.checkpoint, figures)
    training.publish(trainer, results, model_args, data_args, task="text-generation")


if __name__ == "__main__":
    run(main, arguments.wants_traceback)
