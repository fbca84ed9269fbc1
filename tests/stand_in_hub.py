"""A stand-in of the Hugging Face hub on 127.0.0.1, for tests on machines that reach no network.

Nothing here talks to huggingface.co, and no real weights or texts are served. Simulated are the calls with which
huggingface_hub, transformers and datasets read a repository: repository info, tree listings, paths-info, and HEAD
and GET of files (with ranges); and those that create a model's repository and commit small files to it, by whoever holds
the token `TOKEN`. Every repository has the one branch "main" at the one made-up commit `COMMIT_SHA`.
Left out: accounts, gated repositories, LFS and xet storage, paging, the dataset viewer.

The libraries read HF_ENDPOINT when they are imported, so let a subprocess use it:

    with StandInHub(root, aliases={"gpt2": "openai-community/gpt2"}) as hub:
        subprocess.run([sys.executable, "run_clm.py", ...], env=client_environment(hub.url, fresh_folder))
"""

import base64
import hashlib
import json
import os
import random
import re
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT_SHA = "5e5a1f0c0ffee0ddba11c0de5eed5ca1ab1e0b0e"
TOKEN = "hf_of_the_stand_in"
_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_REPO}"
    r"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?"
)
_RESOLVE = re.compile(rf"/(?P<kind>datasets/)?{_REPO}/(?P<verb>resolve)/(?P<revision>[^/]+)/(?P<file>.+)")
_UPLOAD = re.compile(rf"/api/models/{_REPO}/(?P<verb>preupload|commit)/main")


def client_environment(endpoint: str, home: str | Path, **extra: str) -> dict[str, str]:
    """This process's environment for a client of `endpoint`: a fresh HF_HOME, no other hub setting, no proxy."""
    ours = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **extra}


class StandInHub:
    """Serves root/models/<org>/<name>/... and root/datasets/<org>/<name>/... while its `with` block lasts.

    `aliases` maps an old name to the one it moved to, answered with a redirect (307) as the hub does; a data set's
    names begin with "datasets/". `requests` holds "METHOD path" (no query) of every request, in order of arrival.
    """

    def __init__(self, root: str | Path, aliases: Mapping[str, str] | None = None) -> None:
        self.root = Path(root).resolve()
        self.aliases = dict(aliases or {})
        self.requests: list[str] = []
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StandInHub":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: StandInHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up, as a stream that is not read to its end does."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr: tests read `StandInHub.requests`."""

    def do_GET(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        form = parse_qs(body)
        hub.requests.append(f"{self.command} {path}")
        if path in ("/api/whoami-v2", "/api/repos/create", "/api/validate-yaml") or _UPLOAD.fullmatch(path):
            return self._take(path, body)
        match = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        if match is None:
            return self._fail("", "the stand-in does not know this path")
        prefix = "datasets/" if (match["kind"] or "").startswith("datasets") else ""
        name, file = unquote(match["repo"]), unquote(match["file"] or "")
        if moved_to := hub.aliases.get(prefix + name):
            before, after = self.path[: match.start("repo")], self.path[match.end("repo") :]
            location = before + quote(moved_to.removeprefix(prefix)) + after
            return self._send(HTTPStatus.TEMPORARY_REDIRECT, Location=location)

        repo = (hub.root / (prefix or "models") / name).resolve()
        target = (repo / file).resolve()
        if "/" not in name or ".." in name.split("/") or not repo.is_dir():
            return self._fail("RepoNotFound", "Repository not found")
        if unquote(match["revision"] or "main") not in ("main", COMMIT_SHA):
            return self._fail("RevisionNotFound", "Invalid rev id")
        if not target.is_relative_to(repo) or not target.exists():
            return self._fail("EntryNotFound", "Entry not found")
        if match["verb"] in ("resolve", "tree") and target.is_file() != (match["verb"] == "resolve"):
            return self._fail("EntryNotFound", "Entry not found")

        if match["verb"] == "resolve":
            self._send_file(target)
        elif match["verb"] == "tree":
            deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            self._send_json([_entry(repo, path) for path in sorted(target.glob("**/*" if deep else "*"))])
        elif match["verb"] == "paths-info":
            asked = [(repo / path).resolve() for path in form.get("paths", [])]
            self._send_json([_entry(repo, path) for path in asked if path.is_relative_to(repo) and path.exists()])
        else:
            files = [path.relative_to(repo).as_posix() for path in sorted(repo.rglob("*")) if path.is_file()]
            about = {"id": name, "sha": COMMIT_SHA, "private": False, "gated": False, "disabled": False, "tags": []}
            self._send_json({**about, "siblings": [{"rfilename": file} for file in files]})

    do_HEAD = do_POST = do_GET

    def _take(self, path: str, body: str) -> None:
        """What pushing asks: whose token it is, a repository, whether a card is well formed, how and which files to add."""
        hub = self.server.hub
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(HTTPStatus.UNAUTHORIZED, **{"X-Error-Message": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self._send_json({"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            (hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
            return self._send_json({"url": f"{hub.url}/{name}", "name": name, "id": name})
        match = _UPLOAD.fullmatch(path)
        folder = hub.root / "models" / match["repo"]
        if match["verb"] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._send_json({"files": files})
        for line in map(json.loads, filter(None, body.splitlines())):
            if line["key"] == "file":
                target = (folder / line["value"]["path"]).resolve()
                assert target.is_relative_to(folder.resolve())
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"{hub.url}/{match['repo']}/commit/{COMMIT_SHA}"
        self._send_json({"success": True, "commitOid": COMMIT_SHA, "commitUrl": url, "hookOutput": ""})

    def _send_file(self, file: Path) -> None:
        """A file, or the range of it that was asked for, with the headers that the clients cache it by."""
        content = file.read_bytes()
        headers = {"ETag": f'"{_git_oid(content)}"', "X-Repo-Commit": COMMIT_SHA, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or asked.groups() == ("", ""):
            return self._send(HTTPStatus.OK, content, "application/octet-stream", **headers)
        first, last = (int(number) if number else None for number in asked.groups())
        if first is None:  # "bytes=-n": the last n bytes
            first, last = max(len(content) - (last or 0), 0), None
        stop = len(content) if last is None else min(last + 1, len(content))
        if first >= stop:
            headers["Content-Range"] = f"bytes */{len(content)}"
            return self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, **headers)
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        self._send(HTTPStatus.PARTIAL_CONTENT, content[first:stop], "application/octet-stream", **headers)

    def _send_json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), "application/json")

    def _fail(self, code: str, message: str) -> None:
        """A 404 (the hub tells strangers 401 of a missing repository); huggingface_hub goes by the hub's `code`."""
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        if code == "EntryNotFound":  # with the commit, clients remember that it has no such file
            headers["X-Repo-Commit"] = COMMIT_SHA
        self._send(HTTPStatus.NOT_FOUND, json.dumps({"error": message}).encode(), "application/json", **headers)

    def _send(self, status: HTTPStatus, body: bytes = b"", content_type: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(repo: Path, path: Path) -> dict[str, Any]:
    """A file or folder as tree listings and paths-info show it."""
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _git_oid(name.encode()), "size": 0}
    return {"type": "file", "path": name, "oid": _git_oid(path.read_bytes()), "size": path.stat().st_size}


_PHRASES = """\
The old harbour|A narrow canal|The stone bridge|The northern railway|The river ferry|The mountain school|The theatre
was built near|was moved to|is known for|was painted beside|stands above|was named after|lost its roof in
the salt market|a field of barley|the eastern gate|the great flood|a row of lime trees|the miller 's daughter
in 1874 .|after the war .|, and it reopened in 1931 .|for nearly 1 @,@ 200 years .|at a cost of 3 @.@ 5 crowns .
"""
_SENTENCE = [line.split("|") for line in _PHRASES.splitlines()]  # a sentence takes one phrase from each line


def _article(rng: random.Random) -> list[str]:
    """The rows of one made-up article in wikitext's form: empty rows, headings, paragraphs that end in " \\n"."""

    def paragraph() -> str:
        sentences = (" ".join(rng.choice(phrases) for phrases in _SENTENCE) for _ in range(rng.randint(5, 9)))
        return f" {' '.join(sentences)} \n"

    rows = ["", f" = {rng.choice(_SENTENCE[0])} = \n", "", paragraph(), paragraph()]
    for section in ("History", "Description", "Later years"):
        rows += ["", f" = = {section} = = \n", "", paragraph(), paragraph()]
    return rows


def make_tiny_gpt2(folder: str | Path, seed: int = 0) -> Path:
    """Save a GPT-2 of random weights (2 layers of width 32) and a byte-level BPE of 300 tokens, the same each time."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(_article(random.Random(0)), vocab_size=299, show_progress=False)
    bpe.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    vocab["<|endoftext|>"] = len(vocab)  # the last id, as in GPT-2
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text("utf-8").splitlines()[1:]]
    GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=128).save_pretrained(folder)

    end = vocab["<|endoftext|>"]
    sizes = {"vocab_size": len(vocab), "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def make_small_wikitext(folder: str | Path, seed: int = 0, articles: int = 15) -> Path:
    """Write made-up articles as parquet files and a card, laid out as in Salesforce/wikitext (one config only).

    articles: of the training text.
    """
    import pyarrow
    import pyarrow.parquet

    folder, config, rng = Path(folder), "wikitext-2-raw-v1", random.Random(seed)
    (folder / config).mkdir(parents=True, exist_ok=True)
    splits, data_files, sizes = "", "", []
    for split, count in (("test", 3), ("train", articles), ("validation", 3)):
        rows = [row for _ in range(count) for row in _article(rng)]
        file = folder / config / f"{split}-00000-of-00001.parquet"
        table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
        pyarrow.parquet.write_table(table, file)
        splits += f"  - name: {split}\n    num_bytes: {table.nbytes}\n    num_examples: {len(rows)}\n"
        data_files += f"  - split: {split}\n    path: {config}/{split}-*\n"
        sizes.append((file.stat().st_size, table.nbytes))
    download_size, dataset_size = (sum(size) for size in zip(*sizes, strict=True))
    info = f"- config_name: {config}\n  features:\n  - name: text\n    dtype: string\n  splits:\n{splits}"
    info += f"  download_size: {download_size}\n  dataset_size: {dataset_size}\n"
    configs = f"- config_name: {config}\n  data_files:\n{data_files}"
    card = f"---\ndataset_info:\n{info}configs:\n{configs}---\n\nMade-up text in wikitext's form, for tests.\n"
    (folder / "README.md").write_text(card, "utf-8")
    return folder
