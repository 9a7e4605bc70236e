"""A hub of one's own: models and data sets from and to a folder, over HTTP, as the hub client asks for them."""

import base64
import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, *arguments) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and len(parts) > 3:  # api/models/OWNER/NAME/tree/main, or revision/main
            repo = self.folder.joinpath(*parts[1:4])
            if not repo.is_dir():
                self.send_error(404)
                return
            paths = {str(f.relative_to(repo)): f.stat().st_size for f in sorted(repo.rglob("*")) if f.is_file()}
            tree = [{"type": "file", "path": path, "size": size, "oid": "0" * 40} for path, size in paths.items()]
            info = {"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": [{"rfilename": path} for path in paths]}
            self.send(json.dumps(tree if "tree" in parts else info).encode())
        else:  # OWNER/NAME/resolve/COMMIT/FILE, data sets with datasets/ in front
            kind, rest = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
            self.answer(self.folder.joinpath(kind, *rest[:2], *rest[4:]))

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        parts, address = urlsplit(self.path).path.strip("/").split("/"), f"http://{self.headers['Host']}"
        if parts[:2] == ["api", "repos"]:  # api/repos/create
            found = json.loads(content)
            repo = f"{found['organization']}/{found['name']}"
            if repo.startswith("somebody/"):
                self.send_error(403)
                return
            self.folder.joinpath("models", repo).mkdir(parents=True, exist_ok=True)
            answer = {"url": f"{address}/{repo}"}
        elif len(parts) == 2:  # api/validate-yaml: of a model card
            answer = {"errors": [], "warnings": []}
        elif parts[4] == "preupload":  # api/models/OWNER/NAME/preupload/main
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **kind} for file in json.loads(content)["files"]]}
        else:  # commit/main: a line for every file
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    file = self.folder.joinpath(*parts[1:4], line["value"]["path"])
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{address}/{'/'.join(parts[2:4])}/commit/{'0' * 40}"
            answer = {"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""}
        self.send(json.dumps(answer).encode())

    def answer(self, file: Path) -> None:
        self.send(file.read_bytes()) if file.is_file() else self.send_error(404)

    def send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve ``models/OWNER/NAME`` and ``datasets/OWNER/NAME`` of a folder; the address is given."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
