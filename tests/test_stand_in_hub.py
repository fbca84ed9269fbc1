"""The stand-in hub, seen through the libraries that will call it; each client runs in a process of its own."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stand_in_hub import COMMIT_SHA, StandInHub, client_environment, make_small_wikitext, make_tiny_gpt2

ALIASES = {"gpt2": "openai-community/gpt2", "datasets/wikitext": "datasets/Salesforce/wikitext"}

# Prints what `attempt` raises, as [[name, first line of the message], ...] along __cause__, and how many seconds
# huggingface_hub would have slept between its attempts. It does not sleep: the tests would take minutes.
PROBE = """
import json, time
slept = []
time.sleep = slept.append
def attempt(call):
    chain = []
    try:
        call()
    except Exception as error:
        while error is not None:
            chain.append([type(error).__name__, (str(error).strip().splitlines() or [""])[0]])
            error = error.__cause__
    print(json.dumps({"chain": chain, "slept": sum(slept)}))
    slept.clear()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    make_tiny_gpt2(root / "models/openai-community/gpt2")
    make_small_wikitext(root / "datasets/Salesforce/wikitext")
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[StandInHub]:
    with StandInHub(root, ALIASES) as hub:
        yield hub


def run_client(code: str, endpoint: str, home: Path, **extra: str) -> list[Any]:
    """What a fresh process prints that runs `code` with `endpoint` as its hub, one JSON value per line."""
    environment = client_environment(endpoint, home, **extra)
    client = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert client.returncode == 0, client.stderr
    return [json.loads(line) for line in client.stdout.splitlines()]


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def ask(url: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
    request = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2"])
def test_model_and_tokenizer_load_by_both_names(hub: StandInHub, tmp_path: Path, name: str) -> None:
    code = f"""
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({name!r})
ids = tokenizer("The stone bridge<|endoftext|>", return_tensors="pt")["input_ids"]
model = AutoModelForCausalLM.from_pretrained({name!r})
loss = model(ids, labels=ids).loss.item()
print(json.dumps([type(model).__name__, type(tokenizer).__name__, len(tokenizer), ids[0, -1].item(), loss]))
print(json.dumps([tokenizer.decode(ids[0]), tokenizer.model_max_length, model.config.n_positions]))
"""
    (model, tokenizer, size, end, loss), facts = run_client(code, hub.url, tmp_path)
    assert (model, tokenizer, size, end) == ("GPT2LMHeadModel", "GPT2Tokenizer", 300, 299)
    assert 5.0 < loss < 6.5  # log(300) is 5.7
    assert facts == ["The stone bridge<|endoftext|>", 128, 128]
    assert f"GET /openai-community/gpt2/resolve/{COMMIT_SHA}/model.safetensors" in hub.requests
    assert any(request.startswith("HEAD /gpt2/") for request in hub.requests) == (name == "gpt2")


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_loads_with_its_splits(hub: StandInHub, tmp_path: Path, streaming: bool) -> None:
    code = f"""
import json
from datasets import load_dataset
splits = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", streaming={streaming})
for name, rows in splits.items():
    print(json.dumps([name, type(rows).__name__, [row["text"] for row in rows]]))
"""
    answers = run_client(code, hub.url, tmp_path)
    kind = "IterableDataset" if streaming else "Dataset"
    assert [answer[:2] for answer in answers] == [["test", kind], ["train", kind], ["validation", kind]]
    rows = {name: texts for name, _, texts in answers}
    assert len(rows["train"]) > 200 and len(" ".join(rows["train"]).split()) >= 12_000
    for texts in rows.values():
        assert "" in texts and " = = History = = \n" in texts
        assert all(text == "" or (text.startswith(" ") and text.endswith(" \n")) for text in texts)
    served = [request for request in hub.requests if request.endswith(".parquet")]
    assert any(request.startswith("HEAD") for request in served) != streaming


def test_missing_things_raise_as_on_the_hub(hub: StandInHub, tmp_path: Path) -> None:
    code = f"""{PROBE}
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoConfig
attempt(lambda: HfApi().model_info("nobody/nothing"))
attempt(lambda: hf_hub_download("nobody/nothing", "config.json"))
attempt(lambda: hf_hub_download("openai-community/gpt2", "no-such-file"))
attempt(lambda: hf_hub_download("openai-community/gpt2", "config.json", revision="no-such-branch"))
attempt(lambda: AutoConfig.from_pretrained("nobody/nothing"))
attempt(lambda: load_dataset("nobody/nothing"))
"""
    names = [[name for name, _ in answer["chain"]] for answer in run_client(code, hub.url, tmp_path)]
    for answer, first in zip(
        names[:4],
        ("RepositoryNotFoundError", "RepositoryNotFoundError", "RemoteEntryNotFoundError", "RevisionNotFoundError"),
        strict=True,
    ):
        assert answer == [first, "HTTPStatusError"]
    assert names[4][:2] == ["OSError", "RepositoryNotFoundError"]
    assert names[5][0] == "DatasetNotFoundError"


def test_datasets_refuses_a_name_without_namespace_but_the_hub_tells_the_full_one(
    hub: StandInHub, tmp_path: Path
) -> None:
    code = f"""{PROBE}
from datasets import load_dataset
from huggingface_hub import HfApi
attempt(lambda: load_dataset("wikitext", "wikitext-2-raw-v1"))
print(json.dumps(HfApi().dataset_info("wikitext").id))
"""
    refusal, full_name = run_client(code, hub.url, tmp_path)
    ((name, message),) = refusal["chain"]
    assert name == "HfUriError" and "Repository id must be 'namespace/name', got 'wikitext'" in message
    assert full_name == "Salesforce/wikitext"


@pytest.mark.parametrize("offline", [False, True])
def test_what_an_unreachable_hub_raises(tmp_path: Path, offline: bool) -> None:
    code = f"""{PROBE}
from datasets import load_dataset
from transformers import AutoConfig, AutoTokenizer
attempt(lambda: AutoConfig.from_pretrained("openai-community/gpt2"))
attempt(lambda: AutoTokenizer.from_pretrained("openai-community/gpt2"))
attempt(lambda: load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1"))
"""
    endpoint = closed_port()
    config, tokenizer, data = run_client(code, endpoint, tmp_path, **({"HF_HUB_OFFLINE": "1"} if offline else {}))
    for answer in (config, tokenizer):
        names = [name for name, _ in answer["chain"]]
        assert names == ["OSError", "LocalEntryNotFoundError"] + ([] if offline else ["ConnectError", "ConnectError"])
        assert answer["chain"][0][1].startswith(f"We couldn't connect to '{endpoint}' to load the files")
    why = "OfflineModeIsEnabled" if offline else "LocalEntryNotFoundError"
    assert data["chain"] == [["ConnectionError", f"Couldn't reach 'Salesforce/wikitext' on the Hub ({why})"]]
    slept = [answer["slept"] for answer in (config, tokenizer, data)]
    assert slept == ([0, 0, 0] if offline else [23, 46, 23])  # 1 + 2 + 4 + 8 + 8 seconds for each series of attempts


def test_what_was_loaded_once_is_there_without_the_hub(hub: StandInHub, tmp_path: Path) -> None:
    code = """
import json
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained("gpt2") for kind in (AutoModelForCausalLM, AutoTokenizer))
rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")
print(json.dumps([model.num_parameters(), len(tokenizer), rows.num_rows]))
"""
    first = run_client(code, hub.url, tmp_path)
    asked = len(hub.requests)
    assert run_client(code, hub.url, tmp_path, HF_HUB_OFFLINE="1") == first
    assert len(hub.requests) == asked


def test_files_listings_and_refusals_over_plain_http(hub: StandInHub, root: Path) -> None:
    content = (root / "models/openai-community/gpt2/config.json").read_bytes()
    url = f"{hub.url}/openai-community/gpt2/resolve/main/config.json"
    status, headers, body = ask(url, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(content)))
    assert headers["X-Repo-Commit"] == COMMIT_SHA and len(headers["ETag"].strip('"')) == 40
    assert ask(url)[2] == content
    for asked, part in (("2-5", content[2:6]), ("7-", content[7:]), ("-3", content[-3:]), ("5-9999", content[5:])):
        status, headers, body = ask(url, Range=f"bytes={asked}")
        assert (status, body) == (206, part) and headers["Content-Range"].endswith(f"/{len(content)}")
    assert ask(url, Range="bytes=9999-")[0] == 416

    api = f"{hub.url}/api/datasets/Salesforce/wikitext"
    flat, deep = (json.loads(ask(f"{api}/tree/main?recursive={value}")[2]) for value in (False, True))
    assert [(entry["type"], entry["path"]) for entry in flat] == [
        ("file", "README.md"),
        ("directory", "wikitext-2-raw-v1"),
    ]
    assert len(deep) == 5 and deep[-1]["path"] == "wikitext-2-raw-v1/validation-00000-of-00001.parquet"
    posted = b"paths=README.md&paths=wikitext-2-raw-v1&paths=no&expand=False"
    answer = json.loads(ask(f"{hub.url}/api/datasets/Salesforce/wikitext/paths-info/main", "POST", posted)[2])
    assert answer == flat

    for path, code in (
        ("/api/models/nobody/nothing", "RepoNotFound"),
        ("/api/models/openai-community", "RepoNotFound"),
        ("/api/models/openai-community/gpt2/tree/main/no", "EntryNotFound"),
        ("/openai-community/gpt2/resolve/main/..%2F..%2F..%2Fdatasets", "EntryNotFound"),
        ("/..%2Fdatasets/Salesforce/resolve/main/wikitext", "RepoNotFound"),
        ("/openai-community/gpt2/resolve/v9/config.json", "RevisionNotFound"),
        ("/api/no-such-call", None),
    ):
        status, headers, _ = ask(hub.url + path)
        assert (status, headers["X-Error-Code"]) == (404, code), path
        assert hub.requests[-1] == f"GET {path}"


def test_content_is_the_same_each_time(root: Path, tmp_path: Path) -> None:
    again = (
        (make_tiny_gpt2(tmp_path / "model"), root / "models/openai-community/gpt2"),
        (make_small_wikitext(tmp_path / "data"), root / "datasets/Salesforce/wikitext"),
    )
    for made, before in again:
        files = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
        assert len(files) >= 4
        assert all((made / file).read_bytes() == (before / file).read_bytes() for file in files)
    assert (make_tiny_gpt2(tmp_path / "other", seed=1) / "model.safetensors").read_bytes() != (
        tmp_path / "model/model.safetensors"
    ).read_bytes()
