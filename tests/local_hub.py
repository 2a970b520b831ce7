"""A Hub on this machine, of the few requests that pushing and loading make.

The client is huggingface_hub as it is installed, with `HF_ENDPOINT` at the address of the server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"


class Hub:
    """Repositories in memory.

    Attributes:
        files: content by path, of every commit.
        branches: commit by branch, of every repository.
        private: names of repositories that only the token reads.
        large: what was uploaded aside, by SHA-256.
        requests: method and path of each.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []

    def commit(self, repo_id: str, branch: str, files: dict[str, bytes]) -> str:
        """Add files to a branch, and return the commit."""
        branches = self.branches.setdefault(repo_id, {})
        whole = self.files.get(branches.get(branch, ""), {}) | files
        digest = hashlib.sha1(repr((repo_id, branch, sorted(whole.items()))).encode()).hexdigest()
        self.files[digest] = whole
        branches[branch] = digest
        return digest

    def add_folder(self, repo_id: str, folder: Path) -> str:
        """A repository with the files of a folder."""
        found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        return self.commit(repo_id, "main", {name: p.read_bytes() for name, p in found.items()})

    def read(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.files[self.branches[repo_id][branch]]


def describe(path: str, content: bytes) -> dict[str, Any]:
    """A file, as a listing has it."""
    blob = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": blob}


class Answers(BaseHTTPRequestHandler):
    """What the server says; `hub` is set on a subclass."""

    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def is_allowed(self, repo_id: str) -> bool:
        """Whether a request may read a repository; it is answered if not."""
        known = repo_id in self.hub.branches
        if known and (repo_id not in self.hub.private or self.has_token):
            return True
        self.answer({"error": "not found"}, 401, X_Error_Code="RepoNotFound")
        return False

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    @property
    def address(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host}:{port}"

    def find(self, repo_id: str, revision: str) -> str | None:
        """The commit of a branch or commit; the request is answered if there is none."""
        commit = self.hub.branches[repo_id].get(revision, revision)
        if commit in self.hub.files:
            return commit
        self.answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
        return None

    def begin(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        return path.strip("/").split("/")

    def do_GET(self) -> None:
        parts = self.begin()
        if parts[:2] == ["api", "models"]:
            self.describe_model("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer({"error": "unknown"}, 404)

    do_HEAD = do_GET

    def describe_model(self, repo_id: str, rest: list[str]) -> None:
        what, revision = rest[:2] or ("revision", "main")
        if not self.is_allowed(repo_id) or (commit := self.find(repo_id, revision)) is None:
            return
        files = self.hub.files[commit]
        if what == "tree":
            self.answer([describe(name, content) for name, content in files.items()])
            return
        siblings = [{"rfilename": name} for name in files]
        private = repo_id in self.hub.private
        facts = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": private}
        self.answer({**facts, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def send_file(self, repo_id: str, revision: str, path: str) -> None:
        if not self.is_allowed(repo_id) or (commit := self.find(repo_id, revision)) is None:
            return
        content = self.hub.files[commit].get(path)
        if content is None:
            self.answer({"error": "no file"}, 404, X_Error_Code="EntryNotFound")
            return
        tag = hashlib.sha1(content).hexdigest()
        self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=commit)

    def do_PUT(self) -> None:
        parts = self.begin()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == parts[-1]
        self.hub.large[parts[-1]] = content
        self.answer({})

    def do_POST(self) -> None:
        parts = self.begin()
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if parts == ["api", "validate-yaml"]:
            self.validate(json.loads(content)["content"])
        elif not self.has_token:
            self.answer({"error": "log in first"}, 401)
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(content))
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            objects = json.loads(content)["objects"]
            self.answer({"transfer": "basic", "objects": [self.place(each) for each in objects]})
        else:
            self.change("/".join(parts[2:4]), parts[4], "/".join(parts[5:]), content)

    def validate(self, card: str) -> None:
        head = yaml.safe_load(card.split("---\n")[1])
        assert isinstance(head, dict)
        self.answer({"errors": [], "warnings": []})

    def create(self, wish: dict[str, Any]) -> None:
        repo_id = f"{wish['organization']}/{wish['name']}"
        there = repo_id in self.hub.branches
        if not there:
            self.hub.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            if wish.get("private") or wish.get("visibility") == "private":
                self.hub.private.add(repo_id)
        self.answer({"url": f"{self.address}/{repo_id}"}, 409 if there else 200)

    def place(self, wish: dict[str, Any]) -> dict[str, Any]:
        """Where a large file goes, if it is not there already."""
        if wish["oid"] in self.hub.large:
            return wish
        return wish | {"actions": {"upload": {"href": f"{self.address}/large/{wish['oid']}"}}}

    def change(self, repo_id: str, what: str, branch: str, content: bytes) -> None:
        branches = self.hub.branches[repo_id]
        if what == "branch":
            there = branch in branches
            branches.setdefault(branch, branches["main"])
            self.answer({}, 409 if there else 200)
        elif what == "preupload":
            names = [each["path"] for each in json.loads(content)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            files = zip(names, modes, strict=True)
            told = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in files]
            self.answer({"files": told})
        else:
            assert what == "commit"
            added = {}
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    added[value["path"]] = self.hub.large[value["oid"]]
            commit = self.hub.commit(repo_id, branch, added)
            url = f"{self.address}/{repo_id}/commit/{commit}"
            self.answer({"commitUrl": url, "commitOid": commit, "success": True})


@contextmanager
def served() -> Iterator[tuple[Hub, str]]:
    """A Hub and its address, for as long as the context lasts."""
    hub = Hub()
    handler = type("Handler", (Answers,), {"hub": hub, "protocol_version": "HTTP/1.1"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
