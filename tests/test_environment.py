"""utils/environment.py: the command that repeats a run, and what it ran on."""

import torch

from utils import environment


def test_the_command_hides_tokens() -> None:
    words = ["--token", "hf_secret", "--hub-token=hf_secret", "--do_train", "--use_auth_token", "--seed", "3"]
    assert environment.command("run_clm.py", words, 1, 1) == "python run_clm.py --do_train --seed 3"
    assert environment.command("run_clm.py", ["--a b"], 16, 8).startswith(
        "torchrun --nproc_per_node=8 --nnodes=2 run_clm.py '--a"
    )


def test_the_environment_names_what_is_installed() -> None:
    found = environment.describe(torch.device("cpu"), 2)
    assert found["device"] == "2 × CPU" and found["torch"] == torch.__version__ and found["exchange"] == "gloo"
