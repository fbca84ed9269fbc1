"""Small runs of the scripts, on the simulated NPU and on the CPU, for the tests in this folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from commands import ROOT, run, run_script, run_warm

HERE = Path(__file__).resolve().parent
SIMULATOR = HERE / "simulator"


@dataclass(frozen=True)
class Family:
    """A family's script and its smallest model.

    layers: the name of the configuration's number of layers. no_dropout: settings that leave nothing to chance.
    tied: two names of one weight.
    """

    script: str
    length: str
    sizes: str
    layers: str
    no_dropout: str
    tied: tuple[str, str]

    def overrides(self, layers: int = 2, dropout: bool = False) -> str:
        parts = [self.sizes, f"{self.layers}={layers}", "vocab_size=600"] + ([] if dropout else [self.no_dropout])
        return ",".join(part for part in parts if part)


_GPT = ("run_clm.py", "--block_size", "n_embd=32,n_head=2,n_positions=64", "n_layer")
_NO_GPT_DROPOUT = "resid_pdrop=0.0,attn_pdrop=0.0,embd_pdrop=0.0"
_BERT = "hidden_size=32,num_attention_heads=2,intermediate_size=64,max_position_embeddings=68"
_MASKED = ("run_mlm.py", "--max_seq_length", _BERT, "num_hidden_layers")
_NO_BERT_DROPOUT = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"

FAMILIES = {
    "gpt2": Family(*_GPT, _NO_GPT_DROPOUT, ("lm_head.weight", "transformer.wte.weight")),
    "openai-gpt": Family(*_GPT, _NO_GPT_DROPOUT, ("lm_head.weight", "transformer.tokens_embed.weight")),
    "bert": Family(
        *_MASKED, _NO_BERT_DROPOUT, ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    ),
    "roberta": Family(
        *_MASKED, _NO_BERT_DROPOUT, ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
    ),
    "albert": Family(
        "run_mlm.py",
        "--max_seq_length",
        _BERT + ",embedding_size=16",
        "num_hidden_layers",
        _NO_BERT_DROPOUT,
        ("albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"),
    ),
    "distilbert": Family(
        "run_mlm.py",
        "--max_seq_length",
        "dim=32,n_heads=2,hidden_dim=64,max_position_embeddings=68",
        "n_layers",
        "dropout=0.0,attention_dropout=0.0",
        ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    ),
    "xlnet": Family(
        "run_plm.py",
        "--max_seq_length",
        "d_model=32,n_head=2,d_inner=64",
        "n_layer",
        "dropout=0.0",
        ("lm_loss.weight", "transformer.word_embedding.weight"),
    ),
}


def command(family: str, tokenizer: Path, corpus: Path, layers: int = 2, dropout: bool = False) -> list[str]:
    """The script and flags of a run that trains and evaluates: sequences of 32 tokens, all losses in the log."""
    of = FAMILIES[family]
    flags = {
        "--model_type": family,
        "--config_overrides": of.overrides(layers, dropout),
        "--tokenizer_name": tokenizer,
        "--train_file": corpus / "train.txt",
        "--validation_file": corpus / "validation.txt",
        of.length: 32,
        "--learning_rate": 2e-3,
        "--logging_steps": 1,
    }
    return [of.script, *(str(word) for pair in flags.items() for word in pair), "--do_train", "--do_eval"]


def simulated(devices: int = 1, **variables: str) -> dict[str, str]:
    """Environment variables of a machine with that many simulated NPUs; see simulator/torch_npu."""
    paths = [str(SIMULATOR), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "NPUSIM_DEVICES": str(devices), **variables}


def on_cpu(words: list, folder: Path, *more, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command in Python; its outputs go to `folder`. Fails if the exit code is not `expect`."""
    return run_script(*words, *more, "--output_dir", folder, expect=expect, **environment)


def on_npu(
    words: list,
    folder: Path,
    *more,
    processes: int = 1,
    from_step: int | None = None,
    expect: int = 0,
    **environment: str,
) -> list[dict]:
    """Runs the command on simulated NPUs, one for each process; returns each rank's report: see witness.py.

    from_step: the first step whose requests to the device are in the report.
    """
    reports = Path(f"{folder}-report")
    steps = ["--from_step", from_step] if from_step is not None else []
    recorded = [HERE / "record_run.py", reports, *steps, *words, *more, "--output_dir", folder]
    _run(processes, recorded, expect, simulated(processes) | environment)
    return [json.loads((reports / f"rank{rank}.json").read_text()) for rank in range(processes)]


def as_users_run_it(
    words: list, processes: int = 1, expect: int = 0, **environment: str
) -> subprocess.CompletedProcess:
    """Runs the command as it stands, with nothing around the script."""
    return _run(processes, words, expect, environment)


def _run(processes: int, words: list, expect: int, environment: dict) -> subprocess.CompletedProcess:
    words = [str(word) for word in words]
    if "--device_id" in words:  # it chooses before the devices are counted, which a fork's parent has done
        done = run([sys.executable, *words], **environment)
    else:
        done = run_warm(words, processes=processes if processes > 1 else None, **environment)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done


def readme_commands(script: str) -> list[list[str]]:
    """The words of the README's commands that run this script, from the script on, those under torchrun last."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace(" \\\n", " ")
    lines = re.findall(rf"^(?:python|torchrun --nproc_per_node=8) {script} .*$", text, re.MULTILINE)
    lines.sort(key=lambda line: line.startswith("torchrun"))
    return [shlex.split(line[line.index(script) :]) for line in lines]
