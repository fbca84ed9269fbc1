"""The three scripts, killed and stopped in mid-epoch and started again by the same command, as a user does it.

tests/faults/test_exact_resume.py has all options, in one process.
"""

import pytest
import resume
from commands import TINY_GPT2, log_history, losses, run_script
from test_stops import faulty

from utils import checkpoint

SMALL_BERT = "vocab_size=600,hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
SMALL_XLNET = "vocab_size=600,d_model=32,n_layer=2,n_head=2,d_inner=64"
LENGTH = ["--max_seq_length", "32"]
# Of each script: model and options; where it is killed first. 2 epochs of 10 updates, saved at each third.
CASES = {
    "run_clm.py": (
        [*TINY_GPT2, "--block_size", "32", "--use_combine_grad", "--async_save", "--max_train_samples", "40"],
        "background 18 0 SIGKILL group",  # in the second save: the first flushes 11 files and 3 folders
    ),
    "run_mlm.py": (
        ["--model_type", "bert", "--config_overrides", SMALL_BERT, *LENGTH]
        + ["--fp16", "--fp16_opt_level", "O2", "--use_combine_grad", "--max_train_samples", "40"],
        "forward 8 0 SIGKILL group",
    ),
    "run_plm.py": (
        ["--model_type", "xlnet", "--config_overrides", SMALL_XLNET, *LENGTH]
        + ["--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1"]
        + ["--max_train_samples", "80"],
        "forward 16 0 SIGKILL group",
    ),
}
FAMILIES = {"run_mlm.py": "bert", "run_plm.py": "xlnet"}
TRAIN = ["--do_train", "--per_device_train_batch_size", "4", "--num_train_epochs", "2", "--learning_rate", "3e-3"]
TRAIN += ["--logging_steps", "1", "--save_steps", "3", "--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]


@pytest.mark.parametrize("script", CASES)
def test_a_script_killed_and_stopped_in_mid_epoch_ends_as_if_it_never_was(script, files, tokenizers, tmp_path):
    """SIGKILL in the first epoch, SIGTERM in the second: losses, gradient norms, weights and moments are the same."""
    options, kill = CASES[script]
    words = [*TRAIN, *options, *files[:2]]
    if script in FAMILIES:  # two trainings of a tokenizer number its tokens differently
        words += ["--tokenizer_name", tokenizers(FAMILIES[script])]
    run_script(script, *words, "--output_dir", tmp_path / "whole")
    output = tmp_path / "stopped"
    faulty(tmp_path, kill, *words, "--output_dir", output, script=script, expect=-9)
    first = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert checkpoint.damage(first) is None and not (output / "model.safetensors").exists()
    (tmp_path / "done").unlink()
    each = 2 if script == "run_plm.py" else 1
    stop = f"forward {each * 9} 0 SIGTERM process"
    done = faulty(tmp_path, stop, *words, "--output_dir", output, script=script, expect=143)
    assert f"resuming from {first.name}" in done.stdout
    step = int(first.name.split("-")[1]) + 9
    assert 10 < step < 20 and f"checkpoint-{step} is complete" in done.stdout
    done = run_script(script, *words, "--output_dir", output)
    assert f"resuming from checkpoint-{step}" in done.stdout
    assert len(losses(output)) == 20 and losses(output) == losses(tmp_path / "whole")
    norms = [[entry.get("grad_norm") for entry in log_history(folder)] for folder in (output, tmp_path / "whole")]
    assert norms[0] == norms[1]
    ends = [resume.state_of(folder / "checkpoint-20") for folder in (tmp_path / "whole", output)]
    assert resume.differences(*ends) == []
    models = [(folder / "model.safetensors").read_bytes() for folder in (output, tmp_path / "whole")]
    assert models[0] == models[1]
