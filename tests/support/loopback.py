"""A stand-in for the Hugging Face hub on 127.0.0.1: the real clients run unchanged, without a network."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]
USER, DATE = "loopback", "2025-01-01T00:00:00.000Z"
NAME, REVISION = r"(?P<name>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
REPO = rf"/api/(?P<kind>models|datasets)/{NAME}"

ROUTES = {
    "info": ("GET", rf"{REPO}(?:/revision/{REVISION})?"),
    "tree": ("GET", rf"{REPO}/tree/{REVISION}(?:/(?P<path>.*))?"),
    "paths_info": ("POST", rf"{REPO}/paths-info/{REVISION}"),
    "resolve": ("GET", rf"/(?:(?P<kind>datasets)/)?{NAME}/resolve/{REVISION}/(?P<path>.+)"),
    "create": ("POST", r"/api/repos/create"),
    "preupload": ("POST", rf"{REPO}/preupload/{REVISION}"),
    "commit": ("POST", rf"{REPO}/commit/{REVISION}"),
    "validate": ("POST", r"/api/validate-yaml"),
    "whoami": ("GET", r"/api/whoami-v2"),
}

FIXED: dict[str, object] = {"validate": {}, "whoami": {"type": "user", "name": USER, "orgs": [], "auth": {}}}
PAGES = {"models": "", "datasets": "datasets/"}
SIGNED = {"create", "preupload", "commit", "validate", "whoami"}
REDIRECTING = re.compile(r"(HF|HUGGINGFACE|TRANSFORMERS)_.*(CACHE|OFFLINE)")


class HubError(Exception):
    """A refusal: the clients choose their exception by the status and the code."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer: Answer = (status, named | (headers or {}), json.dumps({"error": message}).encode())


@functools.cache
def files_of(folder: Path) -> dict[str, str]:
    """Path to git's id of its content, in one order, so that equal content has an equal commit."""
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        for path, content in files.items()
    }


@functools.cache
def commit_of(folder: Path) -> str:
    """Forty hex digits, which is how the clients tell a commit from a branch."""
    return hashlib.sha1(json.dumps(files_of(folder)).encode()).hexdigest()


class Repo(NamedTuple):
    """A folder seen as a repository whose only revision is its present content."""

    folder: Path

    def files(self) -> dict[str, str]:
        """Path to blob id."""
        return files_of(self.folder)

    def sha(self) -> str:
        """The commit."""
        return commit_of(self.folder)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Files and the folders above them, as the tree lists them; git knows no empty folder."""
        files, sha = self.files(), self.sha()
        last = {"lastCommit": {"id": sha, "title": "Upload", "date": DATE}}
        above = sorted({str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."})
        folders = {p: {"type": "directory", "oid": hashlib.sha1(f"{sha}/{p}".encode()).hexdigest()} for p in above}
        blobs = {p: {"type": "file", "oid": oid, "size": (self.folder / p).stat().st_size} for p, oid in files.items()}
        return {path: {"path": path, **entry, **last} for path, entry in (folders | blobs).items()}

    def apply(self, changes: dict[str, bytes | None]) -> None:
        """Write, and delete where there are no bytes; checked whole first, as a commit is all or nothing."""
        root = self.folder.resolve()
        places = {(root / name).resolve(): content for name, content in changes.items()}
        for path, content in places.items():
            if root not in path.parents or (content is None and not path.is_file()):
                raise HubError(400, f"{path.name} is not a file of this repository")
        for path, content in places.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if content is None else path.write_bytes(content)
        forget()


def forget() -> None:
    """Files have changed."""
    for known in (files_of, commit_of):
        known.cache_clear()


class LoopbackHub:
    """Serves the folders under `root` as `models/ORG/NAME` and `datasets/ORG/NAME` until the block ends."""

    def __init__(self, root: Path) -> None:
        forget()
        self.root, self.lock = root, threading.RLock()
        self.requests, self.gated, self.private = list[str](), set[str](), set[str]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.socket.listen(64)  # The default of five makes a parallel download wait for retries.
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """For a child process: this hub, its own cache and nothing inherited that leads elsewhere."""
        kept = {name: value for name, value in os.environ.items() if not REDIRECTING.fullmatch(name)}
        direct = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), "127.0.0.1,localhost"]))
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": "hf_loopback"}
        plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": direct, "no_proxy": direct}
        return kept | ours | plain

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        """Write files without a client; the commit that results is returned."""
        with self.lock:
            repo = Repo(self.root / kind / name)
            repo.folder.mkdir(parents=True, exist_ok=True)
            repo.apply(dict(files))
            return repo.sha()


class _Handler(BaseHTTPRequestHandler):
    """One connection; a handler below is named after its route and answers from the parts of the path."""

    hub: LoopbackHub
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def _serve(self) -> None:
        """Read whole, answer alone, send unlocked: no half commit is seen and no slow reader stops the rest."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            try:
                status, headers, body = self._answer()
            except HubError as refusal:
                status, headers, body = refusal.answer
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        """Silent: `LoopbackHub.requests` holds what a test needs."""

    def _answer(self) -> Answer:
        url, verb = urlsplit(self.path), self.command.replace("HEAD", "GET")
        self.hub.requests.append(f"{self.command} {url.path}")
        for name, (method, pattern) in ROUTES.items():
            if method == verb and (match := re.fullmatch(pattern, url.path)):
                if name in SIGNED and "Authorization" not in self.headers:
                    raise HubError(401, "Invalid username or password.")
                self.parts = {key: unquote(value) for key, value in match.groupdict().items() if value}
                self.query = parse_qs(url.query)
                answer = FIXED[name] if name in FIXED else getattr(self, f"_{name}")()
                return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        raise HubError(404, f"{self.command} {url.path} is not served here")

    def _repo(self, *, write: bool = False) -> Repo:
        name, revision = self.parts["name"], self.parts.get("revision", "main")
        repo = Repo(self.hub.root / self.parts.get("kind", "models") / name)
        if "/" not in name or ".." in name or not repo.folder.is_dir():
            raise HubError(404, "Repository not found", "RepoNotFound")
        if name in self.hub.gated and not write:
            raise HubError(403, f"Access to {name} is restricted", "GatedRepo")
        if revision != "main" and (write or revision != repo.sha()):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo

    def _info(self) -> object:
        repo, name = self._repo(), self.parts["name"]
        files = [entry for entry in repo.entries().values() if "size" in entry]
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in files]
        state = {"private": name in self.hub.private, "gated": False, "tags": [], "downloads": 0, "lastModified": DATE}
        return {"id": name, "sha": repo.sha(), "siblings": siblings, **state}

    def _tree(self) -> object:
        repo, top = self._repo(), self.parts.get("path", "").strip("/") or "."
        entries, deep = repo.entries(), self.query.get("recursive", [""])[0].lower() in ("true", "1")
        if top != "." and entries.get(top, {}).get("type") != "directory":
            raise HubError(404, f"{top} does not exist", "EntryNotFound", {"X-Repo-Commit": repo.sha()})
        above = {path: [str(folder) for folder in PurePosixPath(path).parents] for path in entries}
        return [entry for path, entry in entries.items() if top in (above[path] if deep else above[path][:1])]

    def _paths_info(self) -> object:
        entries = self._repo().entries()
        return [entries[path] for path in parse_qs(self.body.decode()).get("paths", []) if path in entries]

    def _resolve(self) -> Answer:
        repo, path = self._repo(), self.parts["path"]
        headers = {"X-Repo-Commit": repo.sha(), "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in (files := repo.files()):
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": repo.sha()})
        content, headers["ETag"] = (repo.folder / path).read_bytes(), f'"{files[path]}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, headers, content
        start, size = int(asked[1]), len(content)
        part = content[start : int(asked[2] or size) + 1]
        if not part:
            raise HubError(416, "Range not satisfiable", "", {"Content-Range": f"bytes */{size}"})
        return 206, headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{size}"}, part

    def _create(self) -> Answer:
        asked = json.loads(self.body)
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or USER}/{asked['name']}"
        if kind not in PAGES:
            raise HubError(400, f"{kind} are not served here")
        new = not (self.hub.root / kind / name).exists()
        self.hub.private |= {name} if new and asked.get("visibility") == "private" else set()
        self.hub.add(kind, name, {})
        return 200 if new else 409, {}, json.dumps({"url": f"{self.hub.url}/{PAGES[kind]}{name}"}).encode()

    def _preupload(self) -> object:
        present, asked = self._repo(write=True).files(), json.loads(self.body)["files"]
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        return {"files": [{"path": file["path"], "oid": present.get(file["path"])} | mode for file in asked]}

    def _commit(self) -> object:
        repo, lines = self._repo(write=True), [json.loads(line) for line in self.body.splitlines()]
        unknown = {line["key"] for line in lines} - {"header", "file", "deletedFile"}
        if unknown or "create_pr" in self.query:
            raise HubError(400, f"not served here: {', '.join(unknown) or 'pull requests'}")
        values = [line["value"] for line in lines if line["key"] != "header"]
        repo.apply({v["path"]: base64.b64decode(v["content"]) if "content" in v else None for v in values})
        page = f"{self.hub.url}/{PAGES[self.parts['kind']]}{self.parts['name']}/commit/{repo.sha()}"
        return {"success": True, "commitOid": repo.sha(), "commitUrl": page}
