"""utils/stream_position.py: batches after a checkpoint are those that would have followed; and the scripts keep to that."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from commands import TINY_GPT2, log_history, losses, results, run_distributed, run_script
from safetensors.torch import load_file
from stream_text import LONGEST, Numbered, load, write

from utils import stream_position
from utils.errors import UsageError
from utils.objectives import causal
from utils.stream_packing import EvaluatedSamples, StreamedSamples
from utils.stream_windows import Cutter
from utils.streaming import Reader


def flags(workers: int = 0, rank: int = 0, ranks: int = 1) -> SimpleNamespace:
    """What of LanguageModelingArguments a loader looks at."""
    return SimpleNamespace(
        dataloader_num_workers=workers,
        dataloader_pin_memory=True,
        dataloader_prefetch_factor=None,
        dataloader_persistent_workers=False,
        dataloader_multiprocessing_context=None,
        device=torch.device("cpu"),
        process_index=rank,
        world_size=ranks,
    )


def loader(text, args, kind: str = "blocks", **options) -> stream_position.StreamLoader:
    options = {"buffer_size": 20, "seed": 1, "rank": args.process_index, "ranks": args.world_size, **options}
    samples = StreamedSamples(text, Numbered(), Cutter(kind, 16), **options)
    return stream_position.loader(samples, 4, causal.collate, args, is_training=True)


def ids(batches, count: int) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("stop", [1, 3, 40])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_after_a_checkpoint_are_those_that_would_have_followed(workers, stop, tmp_path):
    text = load(write(tmp_path, 300, 100))["train"]
    args = flags(workers, rank=1, ranks=2)
    batches = loader(text, args)
    iterator = iter(batches)
    ids(iterator, stop)
    for name in ("0", "1"):
        stream_position.save(batches, tmp_path / "checkpoint-1", flags(workers, rank=int(name), ranks=2))
    after = ids(iterator, 30)
    resumed = loader(text, args)
    stream_position.load(resumed, tmp_path / "checkpoint-1", args)
    random_state = torch.get_rng_state()
    assert ids(resumed, 30) == after
    assert torch.equal(torch.get_rng_state(), random_state)  # dropout goes on as if nothing was loaded


def kept(samples: list[dict]) -> dict:
    """A batch that keeps its samples as they are."""
    return {"input_ids": torch.zeros(len(samples)), "samples": samples}


def test_workers_and_ranks_share_an_epoch(tmp_path):
    """Each document is in the first epoch of one of four readers, once."""
    text = load(write(tmp_path, 2000, 2000, 1000), validation_file=write(tmp_path, 5, first=9000))["train"]
    epochs = [
        itertools.takewhile(lambda step: step[0] is not None, Reader(text, i, 4, 1, True).read()) for i in range(4)
    ]
    sizes = [sum(len(documents) for documents, _ in epoch) for epoch in epochs]
    found: list[int] = []
    for rank in range(2):
        batches = loader(text, flags(2, rank, 2), kind="lines", buffer_size=100)
        batches.collate_fn = kept
        read = {2 * rank: [], 2 * rank + 1: []}
        for batch in itertools.islice(batches, 900):
            for sample in batch["samples"]:
                read[sample["number"][0]].append(int(sample["input_ids"][0]) // LONGEST)
        for reader, documents in read.items():
            found += documents[: sizes[reader]]
    assert sorted(found) == list(range(5000))


def test_evaluation_has_one_worker_at_most(tmp_path):
    text = load(write(tmp_path, 500), "validation", validation_split_percentage=50)["validation"]
    samples = EvaluatedSamples(text, Numbered(), Cutter("blocks", 16), rank=1, ranks=2)
    one, two = (
        ids(stream_position.loader(samples, 4, causal.collate, flags(workers), is_training=False), 1000)
        for workers in (0, 2)
    )
    assert one == two and len(one) > 10


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_one_line_from_a_worker_too(workers, tmp_path):
    files = write(tmp_path, 300, 300)
    text = load(files)["train"]
    (tmp_path / "0-1.jsonl").write_text("{broken\n")
    with pytest.raises(UsageError) as caught:
        ids(loader(text, flags(workers)), 1000)
    assert "0-1.jsonl" in str(caught.value) and "\n" not in str(caught.value) and caught.value.of_one_rank


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": 2}, "was read with dataloader_num_workers 0, now it is 2"),
        ({"ranks": 2}, "was read with processes 1, now it is 2"),
        ({"seed": 2}, "was read with seed 1, now it is 2"),
        ({"buffer_size": 30}, "was read with shuffle_buffer_size 20, now it is 30"),
        ({"kind": "documents"}, "was read with packing blocks, now it is documents"),
    ],
)
def test_another_stream_is_refused(change, words, tmp_path):
    text = load(write(tmp_path, 300))["train"]
    stream_position.save(loader(text, flags()), tmp_path / "c", flags())
    args = flags(**{name: change.pop(name) for name in ("workers", "ranks") if name in change})
    with pytest.raises(UsageError, match=words):
        stream_position.load(loader(text, args, **change), tmp_path / "c", args)


@pytest.mark.parametrize("content", ["", "[]", '{"stream": 1}', "\0"])
def test_a_damaged_state_is_one_line(content, tmp_path):
    text = load(write(tmp_path, 300))["train"]
    with pytest.raises(UsageError, match="has no data_state_0.json"):
        stream_position.load(loader(text, flags()), tmp_path, flags())
    (tmp_path / "data_state_0.json").write_text(content)
    with pytest.raises(UsageError, match="data_state_0.json: cannot be read"):
        stream_position.load(loader(text, flags()), tmp_path, flags())


# ---- the scripts ----
SHORT = ["--streaming", "--max_steps", 8, "--logging_steps", 1, "--save_steps", 3, "--per_device_train_batch_size", 2]
SCRIPTS = {
    "run_clm.py": [*TINY_GPT2, "--block_size", 32],
    "run_mlm.py": ["--model_type", "bert", "--max_seq_length", 32, "--config_overrides",
        "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,max_position_embeddings=64"],
    "run_plm.py": ["--model_type", "xlnet", "--max_seq_length", 32, "--config_overrides",
        "d_model=32,n_layer=2,n_head=2,d_inner=64"],
}  # fmt: skip


def resumed_equals_uninterrupted(run, command: list, folder) -> None:
    run(*command, "--output_dir", folder / "whole")
    checkpoint = folder / "whole" / "checkpoint-3"
    run(*command, "--output_dir", folder / "resumed", "--resume_from_checkpoint", checkpoint)
    assert len(losses(folder / "whole")) == 8
    assert losses(folder / "resumed") == losses(folder / "whole")
    epochs = [[entry.get("epoch") for entry in log_history(folder / name)] for name in ("whole", "resumed")]
    assert epochs[0] == epochs[1]
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("run_clm.py", ["--dataloader_num_workers", 2, "--max_train_samples", 8]),  # into the next epoch
        ("run_clm.py", ["--packing", "documents", "--gradient_accumulation_steps", 3, "--use_combine_grad"]),
        ("run_mlm.py", ["--line_by_line", "--gradient_accumulation_steps", 2]),
        ("run_plm.py", ["--dataloader_num_workers", 2]),
    ],
)
def test_a_run_that_resumes_in_mid_stream_is_the_uninterrupted_one(script, options, corpus, tmp_path):
    text = (corpus / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(text.replace("\n", "\n\n") if "documents" in options else text)
    command = [*SCRIPTS[script], "--vocab_size", 300, "--train_file", tmp_path / "train.txt", *SHORT, *options]
    resumed_equals_uninterrupted(lambda *words: run_script(script, *words), [*command, "--do_train"], tmp_path)


def test_two_processes_resume_in_mid_stream(corpus, tmp_path):
    command = [
        *SCRIPTS["run_clm.py"], "--train_file", corpus / "train.txt", *SHORT, "--gradient_accumulation_steps", 2,
        "--dataloader_num_workers", 2, "--do_train", "--do_eval", "--max_eval_samples", 115,
    ]  # fmt: skip
    resumed_equals_uninterrupted(lambda *words: run_distributed("run_clm.py", *words), command, tmp_path)
    assert {f.name for f in (tmp_path / "whole" / "checkpoint-3").glob("data_state_*")} == {
        "data_state_0.json",
        "data_state_1.json",
    }
    found = results(tmp_path / "whole")
    assert found["data_seconds"] >= 0 and found["data_dropped_tokens"] == 0
    assert found["data_tokens"] == results(tmp_path / "resumed")["data_tokens"] == 8 * 2 * 2 * 2 * 32
    # What ranks evaluate together is what one does alone: each sample counts once.
    run_script(
        "run_clm.py", "--model_name_or_path", tmp_path / "whole", "--train_file", corpus / "train.txt", "--streaming",
        "--block_size", 32, "--do_eval", "--max_eval_samples", 115, "--output_dir", tmp_path / "one",
    )  # fmt: skip
    one = results(tmp_path / "one")
    assert found["eval_samples"] == one["eval_samples"] == 115  # not the same for both ranks
    assert found["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
