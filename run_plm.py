#!/usr/bin/env python
"""Trains XLNet on text: tokens are predicted in a random order, each from those that come before it in that order."""

from utils import arguments, garbage_collection
from utils.data_arguments import PermutedDataArguments
from utils.errors import run


def main() -> None:
    # What is asked for. Nothing heavy is imported before this is known to make sense.
    model_args, data_args, args, notes = arguments.parse_run(PermutedDataArguments, __doc__)

    with garbage_collection.last_imports():
        from transformers import AutoModelForCausalLM

        from utils import (
            chunked_head,
            corpus,
            cpu_dropout,
            device,
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
        from utils.objectives import dynamic_masking, permutation, predicted_rows, relative_attention
        from utils.trainer import LanguageModelingTrainer

    log.set_up(args, notes)

    # The output folder: new, an unfinished run to go on with, or a finished one.
    wanted = arguments.snapshot((model_args, data_args, args))
    claim = output_folder.claim_for_all(args, "run_plm.py", wanted)
    if claim.verdict == "finished":
        return
    elastic.keep_global_batch(args, claim.checkpoint)

    # Text, tokenizer, sequences.
    text = corpus.load_text(data_args, args.splits, model_args.cache_dir, model_args.token, args.seed)
    first_text = text[args.splits[0]]
    config, tokenizer = model.load_config_and_tokenizer("run_plm.py", first_text, model_args, claim.checkpoint)
    tokenization.check_mask_token(tokenizer)
    length = packing.choose_block_size(data_args.max_seq_length, tokenizer, config, "--max_seq_length")
    make_samples = stream_packing.make_samples if data_args.streaming else packing.make_samples
    samples, figures = make_samples(
        text, tokenizer, length, data_args, args, model_args.cache_dir, data_args.line_by_line
    )

    # Order and predicted spans: drawn anew in each epoch, for each sample by itself.
    law = permutation.permutation_law(
        tokenizer, data_args.plm_probability, data_args.max_span_length, data_args.full_head
    )
    samples = {split: dynamic_masking.draw(samples[split], law, args.seed) for split in samples}

    # Model and trainer. The query stream and the head have the predicted rows, and no others.
    host_memory.keep_freed_memory(args.device.type, data_args.has_equal_lengths)
    device.seed_all(args.seed)
    network = model.load_model(AutoModelForCausalLM, model_args, config, args)
    cpu_dropout.draw_few_bits(network, args.device.type)
    relative_attention.leave_out_segments(network)
    relative_attention.follow_half_weights(network)
    if not data_args.full_head:
        relative_attention.predict_only_targets(network)
    whole_logits = data_args.full_head or args.layers_are_patched
    in_chunks = not whole_logits and chunked_head.give_sums(network, label_smoothing=args.label_smoothing_factor)
    trainer = LanguageModelingTrainer(
        model=network,
        args=args,
        train_dataset=samples.get("train"),
        eval_dataset=samples.get("validation"),
        processing_class=tokenizer,
        data_collator=permutation.PermutationCollator(
            tokenizer.pad_token_id or 0, length if data_args.pads_to_length else None, data_args.full_head
        ),
        loss_sum=predicted_rows.loss_sum,
        token_sums=predicted_rows.token_sums,
        head_gives_sums=in_chunks,
    )

    # Train, evaluate, report; or say what that would be.
    if args.dry_run:
        return dry_run.show(trainer, figures, claim.checkpoint)
    output_folder.begin_for_all(args, "run_plm.py", wanted, figures)
    results = training.train_and_evaluate(trainer, claim.checkpoint, figures)
    training.publish(trainer, results, model_args, data_args, task="text-generation")


if __name__ == "__main__":
    run(main, arguments.wants_traceback)
