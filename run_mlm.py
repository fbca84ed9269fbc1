#!/usr/bin/env python
"""Trains BERT, RoBERTa, ALBERT and DistilBERT on text: hidden tokens are predicted from all those around them."""

from utils import arguments, garbage_collection
from utils.data_arguments import MaskedDataArguments
from utils.errors import run


def main() -> None:
    # What is asked for. Nothing heavy is imported before this is known to make sense.
    model_args, data_args, args, notes = arguments.parse_run(MaskedDataArguments, __doc__)

    with garbage_collection.last_imports():
        from transformers import AutoModelForMaskedLM

        from utils import (
            chunked_head,
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
            tokenization,
            training,
        )
        from utils.objectives import dynamic_masking, masked, predicted_rows
        from utils.trainer import LanguageModelingTrainer

    log.set_up(args, notes)

    # The output folder: new, an unfinished run to go on with, or a finished one.
    wanted = arguments.snapshot((model_args, data_args, args))
    claim = output_folder.claim_for_all(args, "run_mlm.py", wanted)
    if claim.verdict == "finished":
        return
    elastic.keep_global_batch(args, claim.checkpoint)

    # Text, tokenizer, sequences.
    text = corpus.load_text(data_args, args.splits, model_args.cache_dir, model_args.token, args.seed)
    first_text = text[args.splits[0]]
    config, tokenizer = model.load_config_and_tokenizer("run_mlm.py", first_text, model_args, claim.checkpoint)
    tokenization.check_mask_token(tokenizer)
    length = packing.choose_block_size(data_args.max_seq_length, tokenizer, config, "--max_seq_length")
    make_samples = stream_packing.make_samples if data_args.streaming else packing.make_samples
    samples, figures = make_samples(
        text, tokenizer, length, data_args, args, model_args.cache_dir, data_args.line_by_line
    )

    # What is hidden: drawn anew in each epoch, for each sample by itself.
    law = masked.masking_law(tokenizer, data_args.mlm_probability, data_args.whole_word_mask)
    samples = {split: dynamic_masking.draw(samples[split], law, args.seed) for split in samples}

    # Model and trainer. The head predicts what is hidden, and nothing else.
    host_memory.keep_freed_memory(args.device.type, data_args.has_equal_lengths)
    device.seed_all(args.seed)
    network = model.load_model(AutoModelForMaskedLM, model_args, config, args)
    varlen = data_args.packing == "documents" and document_packing.keep_documents_apart(network, causal=False)
    cpu_dropout.draw_few_bits(network, args.device.type)
    full_head = data_args.full_head or not masked.predict_only_masked(network)
    whole_logits = full_head or args.layers_are_patched
    in_chunks = not whole_logits and chunked_head.give_sums(network, label_smoothing=args.label_smoothing_factor)
    trainer = LanguageModelingTrainer(
        model=network,
        args=args,
        train_dataset=samples.get("train"),
        eval_dataset=samples.get("validation"),
        processing_class=tokenizer,
        data_collator=masked.MaskedCollator(
            law, tokenizer.pad_token_id or 0, length if data_args.pads_to_length else None, full_head, varlen
        ),
        loss_sum=predicted_rows.loss_sum,
        token_sums=predicted_rows.token_sums,
        head_gives_sums=in_chunks,
    )

    # Train, evaluate, report; or say what that would be.
    if args.dry_run:
        return dry_run.show(trainer, figures, claim.checkpoint)
    output_folder.begin_for_all(args, "run_mlm.py", wanted, figures)
    results = training.train_and_evaluate(trainer, claim.checkpoint, figures)
    training.publish(trainer, results, model_args, data_args, task="fill-mask")


if __name__ == "__main__":
    run(main, arguments.wants_traceback)
