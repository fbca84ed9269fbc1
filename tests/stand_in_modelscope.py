"""A local stand-in of ModelScope's HTTP interface, as far as its library reads folders of models and datasets.

The paths and fields are those that modelscope_hub 0.5 asks for (its _legacy_api.py): a list of files, and each file.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class StandInModelScope:
    """Serves <root>/models/OWNER/NAME and <root>/datasets/OWNER/NAME; every branch is the same. url: where."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandInModelScope":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        root = self.root

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                address = urlsplit(self.path)
                repository, _, what = address.path.removeprefix("/api/v1/").partition("/repo")
                folder = root / repository
                file = folder / parse_qs(address.query).get("FilePath", ["."])[0]
                if what in ("/files", "/tree") and folder.is_dir():
                    self.answer(
                        json.dumps({"Code": 200, "Success": True, "Data": {"Files": files_of(folder)}}).encode()
                    )
                elif file.is_file():
                    self.answer(file.read_bytes())
                else:
                    self.answer(json.dumps({"Code": 404, "Message": f"{repository} not exists"}).encode(), 404)

            def answer(self, content: bytes, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_) -> None:
                pass

        return Handler


def files_of(folder: Path) -> list[dict]:
    """What the list of a repository says of each of its files."""
    return [
        {
            "Name": path.name,
            "Path": str(path.relative_to(folder)),
            "Type": "blob",
            "Size": path.stat().st_size,
            "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
