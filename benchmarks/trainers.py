"""The two recipes that benchmarks compare: transformers' Trainer with its own collators, and ours as the scripts set it up.

Both have equal weights and equal blocks of tokens. What is hidden or predicted each draws by its own law, in training; for
the loss of a probe both are given the same.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from utils.packing import Blocks
from utils.training_arguments import LanguageModelingArguments

# What is not the default of a configuration, for models of their real size.
MODELS = {
    "gpt2": ("gpt2", {}),
    "openai-gpt": ("openai-gpt", {}),
    "bert-base": ("bert", {}),
    "distilbert-base": ("distilbert", {}),
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "albert-base": ("albert", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),
    "xlnet-base": ("xlnet", {"n_layer": 12, "d_model": 768, "n_head": 12, "d_inner": 3072}),
}
PROBE = 2  # sequences whose loss is compared
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@dataclass(frozen=True)
class Recipe:
    """One side of a comparison.

    objective: clm, mlm or plm. model: one of MODELS. flags: of TrainingArguments, for ours of LanguageModelingArguments.
    overrides: settings of the configuration, as --config_overrides has them. rows: sequences to train on.
    """

    is_ours: bool
    objective: str
    model: str
    batch: int
    length: int
    rows: int
    on_cpu: bool
    flags: dict = field(default_factory=dict)
    overrides: str = ""
    log_steps: int = 1


def make(recipe: Recipe) -> tuple[Trainer, Callable[[], float]]:
    """(a trainer that has not begun, a function that tells the loss of its present weights on the probe)."""
    config = make_config(recipe)
    config.use_cache = False
    tokenizer = make_tokenizer(config.vocab_size)
    ids = make_ids(recipe.rows + PROBE, recipe.length, config.vocab_size)
    torch.manual_seed(0)
    kind = AutoModelForMaskedLM if recipe.objective == "mlm" else AutoModelForCausalLM
    model = kind.from_config(config)
    build = ours if recipe.is_ours else stock
    trainer, probe = build(recipe, model, tokenizer, ids[:-PROBE], ids[-PROBE:])
    trainer.pop_callback(PrinterCallback)
    return trainer, probe


def make_config(recipe: Recipe):
    family, settings = MODELS[recipe.model]
    config = CONFIG_MAPPING[family](**settings)
    if recipe.overrides:
        config.update_from_string(recipe.overrides)
        config = type(config)(**{name: value for name, value in config.to_diff_dict().items() if name != "d_head"})
    for name in ("n_positions", "max_position_embeddings"):
        if vars(config).get(name, recipe.length + 2) < recipe.length + 2:
            setattr(config, name, recipe.length + 2)  # RoBERTa's positions begin at 2
    return config


def make_tokenizer(vocabulary: int):
    """As many words as the model knows, five of them special: what collators ask of a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=plain, **dict(zip(names, SPECIAL, strict=True)))


def make_ids(rows: int, length: int, vocabulary: int) -> np.ndarray:
    """Words of which few are frequent, so that there is something to learn: int32 (rows, length)."""
    draws = np.random.default_rng(0).random((rows, length))
    return (len(SPECIAL) + (vocabulary - len(SPECIAL)) ** draws - 1).astype(np.int32)


def arguments(recipe: Recipe, kind: type[TrainingArguments]) -> TrainingArguments:
    return kind(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch,
        max_steps=1_000_000,  # it is stopped from outside
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=recipe.log_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        use_cpu=recipe.on_cpu,
        prediction_loss_only=True,
        **recipe.flags,
    )


def stock(recipe: Recipe, model, tokenizer, ids: np.ndarray, probe_ids: np.ndarray) -> tuple[Trainer, Callable]:
    """transformers' scripts: a dataset of lists, its collators, the head on all positions. Its evaluation is of the loss
    alone, which is the fastest it has; ours tells the accuracy as well."""
    import datasets
    import transformers

    columns = {"input_ids": list(ids)}
    if recipe.objective == "clm":
        columns |= {"attention_mask": list(np.ones_like(ids)), "labels": list(ids)}
        collate = transformers.default_data_collator
    elif recipe.objective == "mlm":
        columns |= {"attention_mask": list(np.ones_like(ids)), "special_tokens_mask": list(np.zeros_like(ids))}
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    else:
        collate = transformers.DataCollatorForPermutationLanguageModeling(tokenizer, 1 / 6, 5)
    args = arguments(recipe, TrainingArguments)
    dataset = datasets.Dataset.from_dict(columns)
    trainer = Trainer(model, args, train_dataset=dataset, eval_dataset=dataset, data_collator=collate)
    batch = probe_batch(recipe, tokenizer, probe_ids)

    def probe() -> float:
        model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            return model(**{name: value.to(args.device) for name, value in batch.items()}).loss.item()

    return trainer, probe


def probe_batch(recipe: Recipe, tokenizer, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """What ours draws for the probe, in the form that transformers' models take: a row for each position."""
    from utils.objectives import causal

    samples, collate = samples_of(recipe, tokenizer, ids, full_head=True)
    batch = (collate or causal.collate)([samples[i] for i in range(PROBE)])
    batch.pop("predicted_positions", None)
    return batch


def samples_of(recipe: Recipe, tokenizer, ids: np.ndarray, full_head: bool = False) -> tuple:
    """(samples, their collator), as the scripts make them; no collator of its own for clm."""
    from utils.objectives import dynamic_masking, masked, permutation

    blocks = Blocks(ids)
    if recipe.objective == "mlm":
        law = masked.masking_law(tokenizer, 0.15)
        return dynamic_masking.draw(blocks, law, 0), masked.MaskedCollator(
            law, tokenizer.pad_token_id, full_head=full_head
        )
    if recipe.objective == "plm":
        law = permutation.permutation_law(tokenizer, 1 / 6, 5, full_head)
        collate = permutation.PermutationCollator(tokenizer.pad_token_id, full_head=full_head)
        return dynamic_masking.draw(blocks, law, 0), collate
    return blocks, None


def ours(recipe: Recipe, model, tokenizer, ids: np.ndarray, probe_ids: np.ndarray) -> tuple[Trainer, Callable]:
    """What run_clm.py, run_mlm.py and run_plm.py do between their blocks and training."""
    from utils import chunked_head, cpu_dropout, host_memory, native_activations
    from utils.objectives import causal, masked, predicted_rows, relative_attention
    from utils.trainer import LanguageModelingTrainer

    host_memory.keep_freed_memory("cpu" if recipe.on_cpu else "")
    native_activations.use_native_activations(model)
    samples, collate = samples_of(recipe, tokenizer, ids)
    parts = {"loss_sum": predicted_rows.loss_sum, "token_sums": predicted_rows.token_sums}
    if recipe.objective == "clm":
        causal.expect_whole_blocks()
        collate, parts = causal.collate, {"token_sums": causal.token_sums}
        in_chunks = causal.predict_in_chunks(model)
    elif recipe.objective == "mlm":
        masked.predict_only_masked(model)
    else:
        relative_attention.leave_out_segments(model)
        relative_attention.follow_half_weights(model)
        relative_attention.predict_only_targets(model)
    if recipe.objective != "clm":
        in_chunks = chunked_head.give_sums(model)
    cpu_dropout.draw_few_bits(model, "cpu" if recipe.on_cpu else "")
    args = arguments(recipe, LanguageModelingArguments)
    trainer = LanguageModelingTrainer(
        model=model,
        args=args,
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=collate,
        head_gives_sums=in_chunks,
        **parts,
    )
    probe_samples, _ = samples_of(recipe, tokenizer, probe_ids)
    return trainer, lambda: trainer.evaluate(probe_samples)["eval_loss"]
