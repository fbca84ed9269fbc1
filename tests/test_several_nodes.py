"""Two nodes that train together by scripts/launch.sh, one of which is lost: network namespaces, with gloo."""

import os
import re
import signal
import socket
import sys
from pathlib import Path

import namespaces
import pytest
from commands import TINY_GPT2, losses, run_distributed
from test_launch_scripts import SCRIPTS, environment, processes_of, run, stand_in_python, wait_for

from utils import launch, node_address
from utils.errors import UsageError

WORKER = Path(__file__).with_name("freezing_run_clm.py")
TINY = [*TINY_GPT2[:-1], TINY_GPT2[-1] + ",resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"]
TRAIN = ["clm", *TINY, "--block_size", "32", "--per_device_train_batch_size", "2", "--max_steps", "16"]
TRAIN += ["--save_steps", "4", "--logging_steps", "1", "--report_to", "none", "--do_eval", "false"]
TRAIN += ["--disable_tqdm", "true", "--gradient_accumulation_steps", "2"]
# What is lost is given up after 3 seconds, in place of torchrun's 15.
SOON = ["--ddp_timeout", "15", "--rdzv_conf", "keep_alive_interval=1,last_call_timeout=2"]


@pytest.fixture(scope="module")
def reason() -> str | None:
    return namespaces.why_not()


@pytest.fixture
def nodes(reason):
    if reason is not None:
        pytest.skip(reason)
    with namespaces.Nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> list[float]:
    """The losses of two ranks on one node whom nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, "train_full_8p.sh", *TRAIN, *files, "--nproc", "2", "--output_dir", "output", OMP_NUM_THREADS="1")
    return losses(folder / "output")


class Job:
    """run_clm.py on two nodes by launch.sh. freeze: "rank:step ...", the moments in which something is done to a node."""

    def __init__(self, nodes: namespaces.Nodes, folder: Path, freeze: str, words: list):
        self.nodes = nodes
        self.folder = folder
        self.output = folder / "output"
        python = stand_in_python(folder, f'shift\nexec "{sys.executable}" "{WORKER}" "$@"')
        self.words = [str(word) for word in (*words, "--nproc", "1", "--output_dir", self.output)]
        self.surroundings = environment(PYTHON=python, OMP_NUM_THREADS="1", FREEZE=freeze, FREEZE_NOTES=str(folder))

    def start(self, node: int) -> None:
        command = ["bash", str(SCRIPTS / "launch.sh"), "full", "1", *self.words, "--node_rank", str(node)]
        command += ["--master_addr", self.nodes.addresses[0]]
        self.nodes.start(node, command, cwd=self.folder, env=self.surroundings)

    def wait_until_frozen(self, place: str) -> None:
        try:
            wait_for((self.folder / place).exists, "no rank has frozen", seconds=90)
        except AssertionError as error:
            raise AssertionError(self.log(0)[-3000:]) from error

    def log(self, rank: int) -> str:
        path = self.output / f"train_{rank}.log"
        return path.read_text() if path.exists() else ""

    def finish(self, node: int) -> str:
        started = self.nodes.running[node]
        out, err = started.communicate(timeout=120)
        del self.nodes.running[node]
        assert started.returncode == 0, f"{out[-4000:]}\n{err[-4000:]}"
        return out


def is_told_to_end(process: int) -> bool:
    """Whether SIGTERM waits for a frozen process."""
    status = Path(f"/proc/{process}/status").read_text()
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in re.findall(r"^S\w+Pnd:\s*(\w+)", status, re.M))


def test_a_killed_node_comes_back_and_the_run_ends_alike(nodes, files, tmp_path, undisturbed) -> None:
    """Node 0, which keeps the list of nodes: the other one waits for it. Losses are equal bit for bit."""
    words = [*TRAIN, *files, *SOON, "--nnodes", "2", "--max_restarts", "3"]
    job = Job(nodes, tmp_path, "0:10", words)
    job.start(0), job.start(1)
    job.wait_until_frozen("0:10")
    nodes.kill(0)
    job.start(0)
    told = job.finish(0)
    assert job.finish(1).endswith("the results are on node 0\n")
    assert "Final Performance samples/sec" in told
    assert job.log(0).count("resuming from checkpoint-8") == 1
    assert losses(job.output) == undisturbed


def test_an_elastic_run_goes_on_alone_and_together_again(nodes, files, tmp_path, undisturbed) -> None:
    """Node 1's cable is pulled. Node 0 goes on with twice the micro-batches until node 1 is there again, and saves then."""
    words = [*TRAIN, *files, *SOON, "--nnodes", "1:2", "--max_restarts", "3"]
    job = Job(nodes, tmp_path, "1:10 0:12", words)
    job.start(0), job.start(1)
    job.wait_until_frozen("1:10")
    nodes.cut(1)
    job.wait_until_frozen("0:12")
    alone = "--elastic: 8 samples a step as before, in 4 micro-batches of 2 on each of 1 processes"
    assert job.log(0).count(alone) == 1 and job.log(0).count("resuming from checkpoint-8") == 1
    nodes.kill(1)
    nodes.mend(1)
    job.start(1)
    [rank] = processes_of(job.output, rank=0)
    wait_for(lambda: is_told_to_end(rank), "torchrun has not seen that node 1 is back")
    os.kill(rank, signal.SIGCONT)
    job.finish(0), job.finish(1)
    log = job.log(0)
    assert "stopped by the launcher, to start again, at step 12; checkpoint-12 is complete" in log
    assert log.count("resuming from checkpoint-12") == 1
    assert losses(job.output) == pytest.approx(undisturbed, rel=1e-6)


def test_a_mistake_ends_an_elastic_run_for_good(files, tmp_path) -> None:
    """One node of two, which waits for the other one first, and then no more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*TRAIN, *files, *SOON, "--nnodes", "1:2", "--max_restarts", "2", "--nproc", "1", "--output_dir", "output"]
    words += ["--master_addr", "127.0.0.1", "--master_port", port, "--block_size", "4000"]
    done = run(tmp_path, "train_full_8p.sh", *words, expect=2)
    assert "rank 0 ended with exit code 2" in done.stderr and "--block_size 4000" in done.stderr
    assert (tmp_path / "output" / "train_0.log").read_text().count(" rank 0: ") == 1


# ---- what nodes share ----
BEGIN = """
import os, sys
from types import SimpleNamespace
import torch.distributed as dist
from accelerate import PartialState
from utils import errors, output_folder
os.environ["GROUP_WORLD_SIZE"] = "2"
output_folder.SHARED_SECONDS = 0.5
dist.init_process_group("gloo")
PartialState(cpu=True)
rank = int(os.environ["RANK"])
args = SimpleNamespace(
    process_index=rank, world_size=2, output_dir=f"{sys.argv[1]}/node{rank}", overwrite_output_dir=False, save_strategy="steps"
)
errors.run(lambda: output_folder.begin_for_all(args, "run_clm.py", {}), lambda: False)
"""


def test_nodes_that_do_not_share_the_output_folder_are_told(tmp_path) -> None:
    script = tmp_path / "begin.py"
    script.write_text(BEGIN)
    done = run_distributed(str(script), tmp_path, expect=1, PYTHONPATH=os.getcwd())
    told = (
        f"--output_dir {tmp_path}/node0: rank 1 on {socket.gethostname()} does not see what rank 0 has written there"
    )
    assert told in done.stderr
    (tmp_path / "node1").symlink_to("node0")
    run_distributed(str(script), tmp_path, PYTHONPATH=os.getcwd())


# ---- how many there may be ----
@pytest.mark.parametrize(
    ("nodes", "words", "is_elastic"),
    [("2", [], False), ("4:4", [], False), ("1:2", [], True), ("2:4", ["--gradient_accumulation_steps=3"], True)],
)
def test_elastic_is_what_may_have_several_numbers_of_nodes(nodes, words, is_elastic) -> None:
    assert launch.check_nodes(nodes, words) is is_elastic
    assert ("--elastic" in launch.complete("full", "clm", words, "", 8, "", is_elastic)) is is_elastic


def test_a_number_of_nodes_that_could_not_go_on_is_told_before() -> None:
    with pytest.raises(
        UsageError, match="the 8 micro-batches .* among 3 nodes; give --gradient_accumulation_steps 3 or"
    ):
        launch.check_nodes("2:4", ["--gradient_accumulation_steps", "2"])


# ---- addresses ----
def test_the_address_towards_a_node_and_its_interface() -> None:
    assert node_address.address_towards("127.0.0.1") == "127.0.0.1"
    assert node_address.interface_of("127.0.0.1") == "lo"
    assert node_address.interface_of("192.0.2.1") is None


def test_a_node_whose_name_nobody_knows_is_one_line(tmp_path) -> None:
    words = ["clm", "--nnodes", "2", "--master_addr", "no-such-node.invalid"]
    done = run(tmp_path, "train_full_8p.sh", *words, expect=2)
    told = f"launch.sh: error: --master_addr no-such-node.invalid: cannot be reached from {socket.gethostname()}"
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
