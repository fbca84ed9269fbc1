"""The real torch_npu wheel, without an NPU: what a user sees who forgot CANN, and whether the names we use exist.

The wheel is downloaded once into a cache folder (TORCH_NPU_WHEEL_CACHE, by default below ~/.cache) and unpacked there.
It is on PYTHONPATH of subprocesses only: once it is installed, `import torch` fails wherever CANN is not.
"""

import ast
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, TINY_GPT2, losses, run, run_script

from utils import cann, device, doctor_checks

VERSION = doctor_checks.requirements(ROOT / "requirements-npu.txt")["torch_npu"].removeprefix("==")
CACHE = Path(
    os.environ.get("TORCH_NPU_WHEEL_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "language-modeling-tests"
)
# libascendcl holds the stubs; of the others torch_npu needs no symbol while it is imported.
EMPTY_LIBRARIES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb")


def unpacked_wheel() -> Path:
    """The wheel's files for this Python, from the cache or the package index; skips, with the reason, without both."""
    folder = CACHE / f"torch_npu-{VERSION}-{sys.implementation.cache_tag}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not folder.is_dir():
            downloads = Path(f"{folder}.part")
            shutil.rmtree(downloads, ignore_errors=True)
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--disable-pip-version-check",
            ]
            try:
                done = subprocess.run(
                    [*pip, "--timeout=15", "--retries=1", f"--dest={downloads}", f"torch_npu=={VERSION}"],
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
            except subprocess.TimeoutExpired:
                pytest.skip(f"torch_npu {VERSION} could not be downloaded within 300 seconds")
            if done.returncode != 0:
                reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                pytest.skip(f"no torch_npu {VERSION} for this Python and machine: {' '.join(reason)[:300]}")
            [wheel] = downloads.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(downloads / "files")
            (downloads / "files").rename(folder)  # whole or not at all
            shutil.rmtree(downloads)
    return folder


@pytest.fixture(scope="module")
def wheel() -> Path:
    if sys.platform != "linux":
        pytest.skip("torch_npu is for Linux")
    return unpacked_wheel()


@pytest.fixture(scope="module")
def without_cann(wheel) -> dict[str, str]:
    """The environment of a user who has installed torch_npu but not sourced CANN."""
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if variable in os.environ:
            pytest.skip("CANN is sourced here: nothing is missing")
    return {"PYTHONPATH": str(wheel)}


@pytest.fixture(scope="module")
def with_stubs(without_cann, tmp_path_factory) -> dict[str, str]:
    """The same with libraries in CANN's place, so that torch_npu can be imported; it finds no device."""
    compiler = shutil.which("gcc") or shutil.which("g++") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: gcc, g++ or cc")
    folder = tmp_path_factory.mktemp("cann")
    (folder / "empty.c").write_text("")
    sources = {"ascendcl": ROOT / "tests" / "npu_wheel" / "stub.c"} | dict.fromkeys(
        EMPTY_LIBRARIES, folder / "empty.c"
    )
    for name, source in sources.items():
        subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / f"lib{name}.so", "-x", "c", source], check=True)
    return without_cann | {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


# ---- what a user sees ----
BERT = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,max_position_embeddings=68"
XLNET = "d_model=32,n_layer=1,n_head=2,d_inner=64"
# A small model of each script's.
SCRIPTS = {
    "run_clm.py": [*TINY_GPT2, "--vocab_size", 300, "--block_size", 32],
    "run_mlm.py": ["--model_type", "bert", "--config_overrides", BERT, "--vocab_size", 300, "--max_seq_length", 64],
    "run_plm.py": ["--model_type", "xlnet", "--config_overrides", XLNET, "--vocab_size", 300, "--max_seq_length", 64],
}


def words(script: str, corpus: Path, output: Path, *more: str) -> list:
    flags = ["--train_file", corpus / "train.txt", "--do_train", "--max_steps", 2, "--logging_steps", 1]
    return [*SCRIPTS[script], *flags, "--output_dir", output, *more]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_that_cann_is_missing(script, without_cann, corpus, tmp_path):
    done = run_script(script, *words(script, corpus, tmp_path / "out"), expect=2, **without_cann)
    [line] = done.stderr.splitlines()
    assert line.startswith(
        f"{script}: error: torch_npu is installed but cannot be loaded: the library libhccl.so of CANN"
    )
    assert re.search(r"source \S+/set_env\.sh", line) and "--use_cpu" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_on_the_cpu_if_told_to(script, without_cann, corpus, tmp_path):
    run_script(script, *words(script, corpus, tmp_path / "out", "--use_cpu"), **without_cann)
    assert len(losses(tmp_path / "out")) == 2


def test_a_script_says_that_there_is_no_npu(with_stubs, corpus, tmp_path):
    done = run_script("run_clm.py", *words("run_clm.py", corpus, tmp_path / "out"), expect=2, **with_stubs)
    [line] = done.stderr.splitlines()
    assert line.startswith("run_clm.py: error: torch_npu is installed but finds no NPU") and "--use_cpu" in line


def doctor(environment: dict[str, str]) -> tuple[int, dict]:
    done = run([sys.executable, "-m", "utils.doctor", "--json"], **environment)
    return done.returncode, {line["name"]: line for line in json.loads(done.stdout)["lines"]}


def test_the_doctor_without_cann(without_cann):
    code, lines = doctor(without_cann)
    assert code == 1
    assert lines["torch"]["status"] == "error" and "libhccl.so of CANN" in lines["torch"]["finding"]
    assert re.search(r"source \S+/set_env\.sh", lines["torch"]["remedy"]) and "--use_cpu" in lines["torch"]["remedy"]
    assert lines["CANN"]["status"] == "error" and "set_env.sh" in lines["CANN"]["remedy"]
    assert lines["torch_npu"]["finding"].startswith(f"{VERSION}, which matches torch")
    assert lines["transformers"]["status"] == lines["libraries"]["status"] == "ok", "what does not need CANN is told"


def test_the_doctor_with_cann_but_no_device(with_stubs, tmp_path):
    home = tmp_path / "cann"
    for folder in ("runtime", "compiler", "opp", "x86_64-linux"):
        (home / folder).mkdir(parents=True)
    (home / "x86_64-linux" / "ascend_toolkit_install.info").write_text(f"version={cann.MADE_FOR}\n")
    sourced = with_stubs | {"ASCEND_HOME_PATH": str(home), "ASCEND_OPP_PATH": str(home / "opp")}
    code, lines = doctor(sourced)
    assert code == 1 and lines["torch"]["status"] == "ok"
    assert lines["CANN"]["status"] == "ok" and cann.MADE_FOR in lines["CANN"]["finding"]
    assert lines["devices"]["status"] == "error" and "finds no NPU" in lines["devices"]["finding"]
    (home / "opp").rmdir()  # set_env.sh of another installation
    code, lines = doctor(sourced)
    assert code == 1 and lines["torch"]["status"] == "error" and "ASCEND_OPP_PATH" in lines["torch"]["finding"]


# ---- the names that utils/device.py uses ----
def calls(source: str) -> list[tuple[str, list[str], int]]:
    """(name, names of keywords, number of other arguments) of each use of torch_npu.npu and of _module(...) in a file.

    An assignment counts as a use without arguments.
    """
    found = []
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if (name := re.sub(r"^(torch_npu\.npu|_module\(.*?\)+)\.", "", path)) != path:
                call = called.get(id(node))
                found.append((name, [k.arg for k in call.keywords] if call else [], len(call.args) if call else -1))
    return found


def test_every_use_of_torch_npu_in_device_py_is_seen_below():
    names = {name for name, _, _ in calls((ROOT / "utils" / "device.py").read_text())}
    assert {"is_available", "set_compile_mode", "config.allow_internal_format", "utils.is_support_inf_nan"} <= names
    assert {"mem_get_info", "max_memory_allocated", "empty_cache", "get_device_name", "device_count"} <= names


def test_each_name_is_in_the_wheel_with_that_signature(wheel):
    """Read from its files, not imported: this needs neither CANN nor a device."""
    functions: dict[str, dict[str, ast.FunctionDef]] = {}  # by file
    settings = set()
    for path in sorted((wheel / "torch_npu" / "npu").glob("*.py")):
        nodes = ast.parse(path.read_text()).body
        functions[path.stem] = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        for node in nodes:
            if isinstance(node, ast.ClassDef) and node.name == "_npuConfig":
                settings |= {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
            if path.stem == "__init__" and isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
                exported = set(ast.literal_eval(node.value))
    for name, keywords, positional in calls((ROOT / "utils" / "device.py").read_text()):
        if name in ("utils", "config"):  # the way to a longer name
            continue
        if name.startswith("config."):
            assert name.removeprefix("config.") in settings, name
            continue
        if name.startswith("utils."):
            places = [functions["utils"]]
        else:
            assert name in exported, f"torch_npu.npu.{name} is not public"
            places = list(functions.values())
        short = name.removeprefix("utils.")
        [definition] = [place[short] for place in places if short in place]
        parameters = definition.args.args + definition.args.kwonlyargs
        assert set(keywords) <= {parameter.arg for parameter in parameters}, f"{name}({keywords})"
        needed = len(definition.args.args) - len(definition.args.defaults)
        assert needed <= max(positional, 0) + len(keywords) <= len(parameters), name


def test_the_wheel_itself_asks_for_our_torch(wheel):
    metadata = (wheel / f"torch_npu-{VERSION}.dist-info" / "METADATA").read_text()
    needed = re.search(r"^Requires-Dist: torch==([\d.]+)", metadata, re.MULTILINE)[1].rstrip(".")
    assert doctor_checks.requirements(ROOT / "requirements.txt")["torch"] == f"=={needed}"


# What must hold of the imported torch_npu, each with what of ours depends on it.
HOLDS = {
    "torch.device('npu').type == 'npu'": "device.configure",
    "device.configure(torch.device('npu')) is None": "settings that a run begins with",
    "device.missing_npu().startswith('torch_npu is installed but finds no NPU')": "arguments",
    "device.backend(torch.device('npu')) == 'hccl' and torch.distributed.is_backend_available('hccl')": "torchrun",
    "device.display_name(torch.device('npu'), 8) == '8p-NPU'": "results",
    "device.seed_all(1) is None": "manual_seed_all, which torch.manual_seed calls",
    "device.shows_overflow(torch.device('cpu'))": "loss scales",
    "torch_npu.npu.utils.is_support_inf_nan": "device.shows_overflow",
    "callable(torch_npu.npu_fusion_attention)": "--attn_implementation flash_attention_2 of transformers",
    "inspect.signature(torch_npu.optim.NpuFusedAdamW).bind([], lr=1, betas=(0, 0), eps=0)": "adamw_torch_npu_fused",
    "inspect.signature(torch_npu.profiler.profile).bind(activities=[], on_trace_ready=0, experimental_config=0)": "profiler",
    "torch_npu.profiler.tensorboard_trace_handler and torch_npu.profiler.ProfilerLevel.Level1 is not None": "profiler",
    "inspect.signature(torch_npu.profiler._ExperimentalConfig).bind(profiler_level=0)": "profiler",
    "native('aten::_fused_adamw_')": "the flat AdamW: one kernel on the device",
    "'npu' in torch.utils._foreach_utils._get_fused_kernels_supported_devices()": "--optim adamw_torch_fused",
    "native('aten::_amp_foreach_non_finite_check_and_unscale_')": "loss scales",
    "native('aten::linalg_vector_norm') or native('aten::linalg_vector_norm.out')": "clipping",
}
ASK = """
import inspect, json, torch, torch_npu, torch_npu.optim, torch_npu.profiler, torch.utils._foreach_utils
from utils import device

def native(operator):
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "PrivateUse1")

print(json.dumps({claim: bool(eval(claim)) for claim in json.loads(input())}))
"""


def test_what_we_build_on_is_in_the_imported_torch_npu(with_stubs):
    environment = {
        **os.environ,
        **with_stubs,
        "PYTHONPATH": f"{with_stubs['PYTHONPATH']}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps([*HOLDS, "native('aten::_foreach_mul_.Tensor')"]),
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers.pop("native('aten::_foreach_mul_.Tensor')") is False, "an operator that is known to be missing"
    assert [claim for claim, true in answers.items() if not true] == []


def test_the_list_of_variables_is_one_that_torch_npu_reads(wheel):
    library = (wheel / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    for name in device.NPU_VARIABLES:
        assert name.encode() + b"\0" in library, name
