"""--torch_compile with each objective: no graph break, and nothing is compiled anew after the first two steps; and whether
a run compiles that says nothing of it."""

import logging

import families
import numpy as np
import pytest
import tiny
import tiny_xlnet
import torch
from test_trainer import arguments, logged
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from utils import chunked_head, compilation, device_compilers, document_packing
from utils.errors import UsageError
from utils.native_activations import use_native_activations
from utils.objectives import causal, dynamic_masking, masked, permutation, relative_attention
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
    document_packing.keep_documents_apart(model, causal=True)
    assert causal.predict_in_chunks(model)
    ends = np.arange(8, 24 * LENGTH + 1, 8)
    ids = blocks(tiny.VOCABULARY).ids.reshape(-1)
    return model, document_packing.DocumentBlocks(ids, ends, LENGTH), causal.DocumentCollator(LENGTH)


def roberta() -> tuple:
    model = families.make("roberta")
    law = masked.MaskingLaw(0.15, 4, families.VOCABULARY, np.arange(families.VOCABULARY) < 5)
    assert masked.predict_only_masked(model) and chunked_head.give_sums(model)
    return model, dynamic_masking.draw(blocks(families.VOCABULARY), law, 0), masked.MaskedCollator(law, 1)


def xlnet() -> tuple:
    model = tiny_xlnet.xlnet()
    relative_attention.leave_out_segments(model)
    relative_attention.follow_half_weights(model)
    relative_attention.predict_only_targets(model)
    assert chunked_head.give_sums(model)
    vocabulary = model.config.vocab_size
    law = permutation.PermutationLaw(1 / 6, 5, 6, np.arange(vocabulary) < 9, False)
    return model, dynamic_masking.draw(blocks(vocabulary), law, 0), permutation.PermutationCollator(5)


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


def test_inductor_trains_as_without_compiling(tmp_path, monkeypatch):
    """The kernels that users get, built by a C++ compiler: the same losses and norms to 1e-5."""
    missing = device_compilers.missing(torch.device("cpu"), "inductor")
    if missing is not None:
        pytest.skip(missing)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()

    def small() -> tuple:
        causal.expect_whole_blocks()
        model = tiny.gpt2(layers=1)
        assert causal.predict_in_chunks(model)
        return model, blocks(tiny.VOCABULARY), causal.collate

    compiled = train(tmp_path / "on", small, torch_compile=True, use_combine_grad=True)
    assert list((tmp_path / "cache").rglob("*.so")), "no kernel was built"
    plain = train(tmp_path / "off", small, torch_compile=False, use_combine_grad=True)
    for key in ("loss", "grad_norm"):
        assert logged(compiled, key) == pytest.approx(logged(plain, key), rel=1e-5)


# ---- what is asked for ----
def test_what_is_said_is_done(tmp_path):
    asked = [
        ({}, (None, None)),
        ({"torch_compile": True}, (True, "inductor")),
        ({"torch_compile": False}, (False, None)),
        (
            {"torch_compile": False, "torch_compile_backend": "aot_eager", "torch_compile_mode": "default"},
            (False, None),
        ),
        ({"torch_compile_backend": "aot_eager"}, (True, "aot_eager")),
    ]
    for options, expected in asked:
        args = arguments(tmp_path, **options)
        assert (args.torch_compile, args.torch_compile_backend) == expected


def test_a_backend_that_accelerate_does_not_know_compiles(tmp_path):
    """As npu, which torch_npu registers."""
    calls = []

    def counting(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    torch._dynamo.register_backend(counting, name="counting")
    torch._dynamo.reset()
    trainer = train(tmp_path, gpt2, torch_compile_backend="counting")
    assert calls and trainer.args.torch_compile_backend == "counting"


def test_a_backend_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match="--torch_compile_backend inductr: choose one of .*inductor"):
        arguments(tmp_path, torch_compile_backend="inductr")


def test_without_a_compiler_inductor_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"--torch_compile: inductor needs a C\+\+ compiler.*; or leave it out"):
        arguments(tmp_path, torch_compile=True)
    arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")


# ---- what is chosen ----
def run(**changes) -> compilation.Run:
    return compilation.Run(**{"layers": 12, "steps": 10_000, "step_seconds": 0.1, "in_half": True, **changes})


def test_a_long_run_compiles_and_a_short_one_does_not():
    compiles, sentence = compilation.decide(run())
    assert compiles and sentence == (
        "torch.compile is on: it takes about 63 s in the first steps, and saves about 3 min of 10000 steps of about 100 ms; "
        "--torch_compile false turns it off"
    )
    compiles, sentence = compilation.decide(run(steps=500))
    assert not compiles and sentence == (
        "torch.compile is off: it takes about 63 s, and would save about 8 s of 500 steps of about 100 ms; --torch_compile "
        "turns it on"
    )


@pytest.mark.parametrize("changes", [{"steps": 1000}, {"step_seconds": 0.01}, {"layers": 120}, {"graphs": 4}])
def test_each_thing_counts(changes):
    assert compilation.decide(run())[0] and not compilation.decide(run(**changes))[0]


def test_half_precision_gains_more():
    assert run(in_half=True).gain > run(in_half=False).gain


def test_the_decision_turns_where_the_gain_is_twice_the_cost():
    edge = 2 * run().cost / run(steps=1).gain
    assert compilation.decide(run(steps=round(edge * 1.01)))[0]
    assert not compilation.decide(run(steps=round(edge * 0.99)))[0]


def test_a_step_takes_no_less_than_its_launches():
    assert compilation.step_seconds(3.5e12, 100e12, 12, 1) == pytest.approx(0.1)
    assert compilation.step_seconds(1.0, 100e12, 12, 2) == pytest.approx(24 * compilation.LAUNCH_SECONDS)


def chosen(tmp_path, caplog, make=gpt2, **options) -> tuple[bool, list[str]]:
    """(Whether the model was compiled, what was said of it.)"""
    torch._dynamo.reset()
    counters.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="utils.compilation"):
        train(tmp_path, make, **options)
    return counters["stats"]["unique_graphs"] > 0, [
        r.message for r in caplog.records if "torch.compile is" in r.message
    ]


def test_a_cpu_does_not_compile_by_itself(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compilation, "MARGIN", 0)
    assert chosen(tmp_path, caplog) == (False, [])


def test_where_it_may_pay_the_run_says_what_it_does(tmp_path, caplog, monkeypatch):
    """On a CPU that is taken for a device that gains by compiling."""
    monkeypatch.setattr(device_compilers, "may_pay", lambda on: True)
    monkeypatch.setattr(compilation, "CHOSEN", "aot_eager")
    compiles, [sentence] = chosen(tmp_path, caplog)
    assert not compiles and sentence.startswith("torch.compile is off: it takes about 23 s, and would save about")
    monkeypatch.setattr(compilation, "MARGIN", 0)
    compiles, [sentence] = chosen(tmp_path, caplog)
    assert compiles and sentence.startswith("torch.compile is on")
    assert chosen(tmp_path, caplog, torch_compile=False) == (False, [])
    compiles, [sentence] = chosen(tmp_path, caplog, auto_find_batch_size=True)
    assert not compiles and "--auto_find_batch_size may change the batch" in sentence


def test_lengths_are_known_to_be_equal(tmp_path):
    _, ids, collate = gpt2()
    assert compilation.lengths_are_equal(ids, collate)
    _, documents, filling = gpt2_with_documents()
    assert compilation.lengths_are_equal(documents, filling)
    ragged = Blocks(ids.ids, ids.ids[0, :5])
    assert not compilation.lengths_are_equal(ragged, collate)
    assert compilation.lengths_are_equal(ragged, causal.PaddedCollator(LENGTH))
