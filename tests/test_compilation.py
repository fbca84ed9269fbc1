"""--torch_compile with each objective: no graph break, and nothing is compiled anew after the first two steps."""

import families
import numpy as np
import pytest
import tiny
import tiny_xlnet
import torch
from test_trainer import arguments, logged
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from utils import chunked_head, document_packing
from utils.native_activations import use_native_activations
from utils.objectives import causal, drawing, masked, permutation, relative_attention
from utils.packing import Blocks
from utils.trainer import LanguageModelingTrainer

LENGTH = 32
O2 = {"bf16": True, "fp16_opt_level": "O2", "use_combine_grad": True}


def blocks(vocabulary: int) -> Blocks:
    return Blocks(np.random.default_rng(0).integers(10, vocabulary, (24, LENGTH)).astype(np.int32))


def gpt2() -> tuple:
    """(model, dataset, collator)"""
    causal.expect_whole_blocks()
    model = tiny.gpt2()
    assert causal.predict_in_chunks(model)
    return model, blocks(tiny.VOCABULARY), causal.collate


def gpt2_with_documents() -> tuple:
    causal.expect_whole_blocks()
    model = tiny.gpt2()
    document_packing.keep_documents_apart(model)
    assert causal.predict_in_chunks(model)
    ends = np.arange(8, 24 * LENGTH + 1, 8)
    ids = blocks(tiny.VOCABULARY).ids.reshape(-1)
    return model, document_packing.DocumentBlocks(ids, ends, LENGTH), causal.DocumentCollator(LENGTH)


def roberta() -> tuple:
    model = families.make("roberta")
    law = masked.MaskingLaw(0.15, 4, families.VOCABULARY, np.arange(families.VOCABULARY) < 5)
    assert masked.predict_only_masked(model) and chunked_head.give_sums(model)
    return model, drawing.draw(blocks(families.VOCABULARY), law, 0), masked.MaskedCollator(law, 1)


def xlnet() -> tuple:
    model = tiny_xlnet.xlnet()
    relative_attention.leave_out_segments(model)
    relative_attention.follow_half_weights(model)
    relative_attention.predict_only_targets(model)
    assert chunked_head.give_sums(model)
    vocabulary = model.config.vocab_size
    law = permutation.PermutationLaw(1 / 6, 5, 6, np.arange(vocabulary) < 9, False)
    return model, drawing.draw(blocks(vocabulary), law, 0), permutation.PermutationCollator(5)


class Graphs(TrainerCallback):
    """How many graphs have been made by the end of each step."""

    def __init__(self):
        self.made = []

    def on_step_end(self, args, state, control, **_):
        self.made.append(counters["stats"]["unique_graphs"])


def train(folder, make, callbacks=(), **options) -> LanguageModelingTrainer:
    model, samples, collate = make()
    use_native_activations(model)
    trainer = LanguageModelingTrainer(
        model=model,
        args=arguments(folder, max_steps=6, learning_rate=1e-3, **options),
        train_dataset=samples,
        data_collator=collate,
        head_gives_sums=True,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, O2], ids=["O0", "O2-combined"])
@pytest.mark.parametrize("make", [gpt2, gpt2_with_documents, roberta, xlnet], ids=lambda make: make.__name__)
def test_graphs_are_whole_and_made_once(tmp_path, make, options):
    torch._dynamo.reset()
    counters.clear()
    graphs = Graphs()
    compiled = train(tmp_path / "on", make, [graphs], torch_compile=True, torch_compile_backend="aot_eager", **options)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert graphs.made[0] > 0 and graphs.made[1:] == [graphs.made[1]] * 5
    plain = train(tmp_path / "off", make, **options)
    tolerance = 1e-5 if not options else 1e-2
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=tolerance)
    assert logged(compiled, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=5 * tolerance)
