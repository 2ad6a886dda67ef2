"""The part of the Hugging Face Hub that huggingface_hub and diffusers talk to, on loopback and in memory.

Reading: model info, tree, paths-info, and files by HEAD and GET with ETag, commit hash and ranges; weights lie behind
a redirect, as on the Hub. Writing, with the token: create, validate-yaml, preupload, LFS batch, commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


def is_large(path: str) -> bool:
    """Whether the Hub stores a file of this name by its sha256, apart from the git tree."""
    return path.endswith((".safetensors", ".bin"))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(path) else git_hash(content)


@dataclass
class Repository:
    """commits: sha to files; refs: branch or tag to sha."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, bytes], revision: str = "main") -> str:
        """The sha of a new commit at the tip of a branch."""
        tree = sorted((path, etag(path, content)) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), tree]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[revision] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


class HubServer:
    """A context manager: `url` is for HF_ENDPOINT, and whoever names `token` may write.

    repositories: what it holds. requests: (method, path, headers) of each request so far. damage: path in a repository
    to what becomes of its content on the way, while sizes and hashes are told as they should be; None breaks the
    connection off half-way, once.
    """

    def __init__(self, token: str = "hf_loopback"):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.damage: dict[str, Callable[[bytes], bytes] | None] = {}
        self._http = self._bound(0)
        port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.store = f"http://localhost:{port}/large"  # by another name: clients follow redirects to their own host

    def _bound(self, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        return server

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Nothing listens at the address for a while."""
        self.__exit__()
        try:
            yield
        finally:
            self._http = self._bound(self._http.server_address[1])
            self.__enter__()

    def add_folder(self, repo_id: str, folder: Path, private: bool = False) -> str:
        """Commit a folder to a repository's main branch, as all that it holds; returns the commit's sha."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.repositories.setdefault(repo_id, Repository(private)).add(files)

    def paths(self, method: str) -> list[str]:
        return [path for verb, path, _ in self.requests if verb == method]


class _Handler(BaseHTTPRequestHandler):
    """A connection for each request, as in HTTP 1.0: none outlives the server."""

    hub: HubServer
    routes = (
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("HEAD GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD GET", r"/large/(?P<oid>\w+)/(?P<path>.+)", "send_large"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/(?P<oid>\w+)", "take_large"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    )

    def dispatch(self):
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, unquote(url.path), dict(self.headers)))
        for methods, pattern, name in self.routes:
            if self.command in methods.split() and (match := re.fullmatch(pattern, url.path)):
                found = {key: value and unquote(value) for key, value in match.groupdict().items()}
                return self._allowed(found) and getattr(self, name)(**found)
        return self.fail(404, "NotFound", f"nothing at {self.command} {self.path}")

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_):
        pass

    def _allowed(self, found: dict) -> bool:
        """Whether the request may go on; answers it if not, in the order in which the Hub looks."""
        named = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        repo = self.hub.repositories.get(found.get("repo"))
        if self.command == "POST" and not named:
            self.fail(401, "", "Invalid username or password.")
        elif "repo" in found and (repo is None or (repo.private and not named)):
            self.fail(404 if named else 401, "RepoNotFound", "Repository not found")
        elif found.get("revision") and repo.refs and repo.sha(found["revision"]) is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {found['revision']}")
        else:
            return True
        return False

    # answers

    def send(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value, status: int = 200):
        self.send(json.dumps(value).encode(), status, Content_Type="application/json")

    def fail(self, status: int, code: str, message: str, **headers):
        self.send(
            json.dumps({"error": message}).encode(), status, X_Error_Code=code, X_Error_Message=message, **headers
        )

    def send_file(self, path: str, content: bytes, **headers):
        """The bytes from/to that a Range header asks for, or all; damaged where that was asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        stop = min(int(match[2]) + 1, len(content)) if match and match[2] else len(content)
        status = 200
        if match:
            status, headers = 206, {**headers, "Content_Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        part = content[start:stop]
        if self.command == "HEAD" or path not in self.hub.damage:
            return self.send(part, status, **headers)
        damage = self.hub.damage[path]
        if damage is not None:
            return self.send(damage(content)[start:stop], status, **headers)
        del self.hub.damage[path]
        return self.send(part[: len(part) // 2], status, **{**headers, "Content_Length": len(part)})

    # reading

    def model_info(self, repo: str, revision: str | None):
        repository = self.hub.repositories[repo]
        sha = repository.sha(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits.get(sha, {}))]
        self.json({"id": repo, "modelId": repo, "sha": sha, "private": repository.private, "siblings": siblings})

    def _entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if is_large(path):
            entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, repo: str, revision: str, path: str | None):
        """All files below a folder; the clients here always ask for recursive listings."""
        assert self.query.get("recursive", [""])[0].lower() == "true", self.path
        files = self.hub.repositories[repo].files(revision)
        self.json(
            [self._entry(name, files[name]) for name in sorted(files) if not path or name.startswith(path + "/")]
        )

    def paths_info(self, repo: str, revision: str):
        files = self.hub.repositories[repo].files(revision)
        asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        self.json([self._entry(path, files[path]) for path in asked if path in files])

    def resolve(self, repo: str, revision: str, path: str):
        repository = self.hub.repositories[repo]
        sha = repository.sha(revision)
        commit = {"X_Repo_Commit": sha}
        files = repository.commits[sha]
        if path not in files:
            return self.fail(404, "EntryNotFound", "Entry not found", **commit)
        tag = etag(path, files[path])
        if not is_large(path):
            return self.send_file(path, files[path], ETag=f'"{tag}"', Accept_Ranges="bytes", **commit)
        self.hub.large[tag] = files[path]
        linked = {"X_Linked_ETag": f'"{tag}"', "X_Linked_Size": len(files[path])}
        return self.send(b"", 302, Location=f"{self.hub.store}/{tag}/{path}", **linked, **commit)

    def send_large(self, oid: str, path: str):
        self.send_file(path, self.hub.large[oid], ETag=f'"{oid}"', Accept_Ranges="bytes")

    # writing

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.repositories:
            return self.json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(bool(private))
        self.hub.repositories[repo].add({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return self.json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate_yaml(self):
        self.json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str):
        files = self.hub.repositories[repo].files(revision)
        answer = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            known = {"oid": etag(path, files[path])} if path in files else {}
            mode = "lfs" if is_large(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.json({"files": answer})

    def batch(self, repo: str):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.store}/{asked['oid']}"}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.large else {"actions": upload})})
        self.json({"transfer": "basic", "objects": objects})

    def take_large(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "BadRequest", "content does not have the hash that was announced")
        self.hub.large[oid] = self.body
        return self.send(b"")

    def commit(self, repo: str, revision: str):
        repository = self.hub.repositories[repo]
        files = dict(repository.files(revision))
        for line in self.body.splitlines():
            change = json.loads(line)
            value = change["value"]
            match change["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.large:
                        return self.fail(400, "BadRequest", f"{value['path']} was not uploaded")
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repository.add(files, revision)
        return self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})
