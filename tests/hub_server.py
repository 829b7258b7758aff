"""A small server that speaks the Hub's protocol, for tests; stock clients find it by HF_ENDPOINT.

    with HubServer({"a-token": "owner"}) as hub:      # hub.url, e.g. http://127.0.0.1:40123
        ...

Everything is kept in memory. It has repositories (private ones answer 401 as if they were not
there), commits as NDJSON, git LFS with uploads that no commit names yet, resolve with redirects,
ranges, ETag and X-Repo-Commit, trees, branches, X-Error-Code, and Xet: token routes, xorbs, shards
and reconstructions (https://huggingface.co/docs/xet). `hub.log` has every request; `hub.before` is
called with its method and path before it is answered, and may block or raise.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_xet import Refused, Xet, byte_range

LFS = (".parquet", ".safetensors", ".bin")  # what the Hub's first .gitattributes names, in part
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "other", "unknown")
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
REPO = rf"/api/((?P<type>datasets)|models)/{ID}"  # type: None is a model
REVISION = r"(?P<revision>[^/]+)"


class File(NamedTuple):
    """`oid` is the git blob's; `sha256` is None for a file that git itself holds."""

    data: bytes
    oid: str
    sha256: str | None

    @classmethod
    def of(cls, data: bytes, lfs: bool) -> "File":
        sha256 = hashlib.sha256(data).hexdigest() if lfs else None
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n"
        pointer += f"size {len(data)}\n"
        blob = pointer.encode() if lfs else data
        return cls(data, hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(), sha256)


@dataclass
class Commit:
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> str:
        before = self.branches.get(branch, "")
        name = hashlib.sha1(f"{before}{title}{sorted(files)}{secrets.token_hex(8)}".encode())
        sha = name.hexdigest()
        self.commits[sha] = Commit(title, files)
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, Commit]:
        sha = self.branches.get(unquote(revision), revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


class HubServer:
    """`tokens`: token -> user, who may write to what begins with the user's name."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS and Xet uploads, by sha256
        self.xet, self.xet_keys = Xet(), {}
        self.log: list[tuple[str, str]] = []
        self.fetched = 0  # bytes that the storage has given out
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.RLock()
        hub = self

        class Bound(Handler):
            server_hub = hub

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that are killed leave broken connections

        self.server = Server(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = self.url.replace("127.0.0.1", "localhost")  # another host, as on the Hub

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def dataset(self, id: str) -> Repo:
        return self.repos["dataset", id]

    def requests(self, pattern: str) -> list[str]:
        """ "METHOD path" of the requests so far that a regular expression is found in."""
        lines = [f"{method} {path}" for method, path in self.log]
        return [line for line in lines if re.search(pattern, line)]


class Handler(BaseHTTPRequestHandler):
    """One method per route; ROUTES below says which."""

    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *values: object) -> None:
        pass

    def answer(self) -> None:
        self.hub = self.server_hub
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = self._body()
        self.hub.log.append((self.command, parts.path))
        try:
            self.hub.before(self.command, parts.path)
            for methods, pattern, function in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in methods:
                    with self.hub.lock:
                        function(self, **match.groupdict())
                    return
            raise Refused(404, "EntryNotFound", f"{self.command} {parts.path}: no such route")
        except Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send(error.status, {"error": error.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_ranged(self, data: bytes, headers: dict[str, str]) -> int:
        wanted = self.headers.get("Range")
        first, last = byte_range(wanted, len(data))
        headers = {"Accept-Ranges": "bytes", **headers}
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206 if wanted else 200, data[first : last + 1], headers)
        return last + 1 - first

    # who is asking

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repo(self, type: str | None, id: str, write: bool = False) -> Repo:
        user, owner = self.user(), id.split("/")[0]
        repo = self.hub.repos.get(("dataset" if type else "model", id))
        if repo is None or (repo.private and user != owner):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refused(403, "", "You have no right to write to this repository")
        return repo

    # the API

    def whoami(self) -> None:
        if not (user := self.user()):
            raise Refused(401, "", "Invalid username or password.")
        self.send(200, {"type": "user", "name": user, "orgs": []})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        owner = asked.get("organization") or user
        if user is None or owner != user:
            raise Refused(403 if user else 401, "", f"You have no rights in {owner}")
        key = asked.get("type", "model"), f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' * (key[0] == 'dataset')}{key[1]}"
        if key in self.hub.repos:
            return self.send(409, {"error": f"You already created this {key[0]}", "url": url})
        repo = self.hub.repos[key] = Repo(asked.get("visibility") == "private")
        attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS)
        file = File.of(attributes.encode(), lfs=False)
        repo.commit("main", "initial commit", {".gitattributes": file})
        self.send(200, {"url": url, "name": key[1]})

    def validate(self) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        card, errors = {}, []
        try:
            card = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            errors.append(f"not YAML: {error}")
        if card.get("license", "unknown") not in LICENCES:
            errors.append(f'"license" must be one of {LICENCES}')
        languages = [str(language) for language in card.get("language", [])]
        if not all(re.fullmatch("[a-z]{2,3}|multilingual", language) for language in languages):
            errors.append('"language" must be ISO 639 codes')
        shown = [{"message": message} for message in errors]
        self.send(400 if errors else 200, {"errors": shown, "warnings": []})

    def info(self, type: str | None, id: str, revision: str = "main") -> None:
        repo = self.repo(type, id)
        sha, commit = repo.at(revision)
        names = [{"rfilename": path} for path in sorted(commit.files)]
        self.send(
            200,
            {
                "id": id,
                "sha": sha,
                "private": repo.private,
                "siblings": names,
                "gated": False,
                "disabled": False,
                "tags": [],
            },
        )

    def refs(self, type: str | None, id: str) -> None:
        repo = self.repo(type, id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repo.branches.items()
        ]
        self.send(200, {"branches": branches, "tags": [], "converts": []})

    def tree(self, type: str | None, id: str, revision: str, path: str | None = None) -> None:
        repo = self.repo(type, id)
        _, commit = repo.at(revision)
        prefix = f"{unquote(path)}/" if path else ""
        names = [name for name in sorted(commit.files) if name.startswith(prefix)]
        if path and not names:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        entries = {}
        for name in names:
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            entries[name] = self._entry(name, commit.files[name])
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        shown = [e for p, e in entries.items() if deep or "/" not in p.removeprefix(prefix)]
        self.send(200, shown)

    def paths_info(self, type: str | None, id: str, revision: str) -> None:
        _, commit = self.repo(type, id).at(revision)
        asked = (
            json.loads(self.body)["paths"]
            if self.body[:1] == b"{"
            else [unquote(value) for value in parse_qs(self.body.decode())["paths"]]
        )
        found = [self._entry(path, commit.files[path]) for path in asked if path in commit.files]
        self.send(200, found)

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": file.oid, "size": len(file.data)}
        if file.sha256:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
            if file.sha256 in self.hub.xet.hash_of:
                entry["xetHash"] = self.hub.xet.hash_of[file.sha256]
        return entry

    def preupload(self, type: str | None, id: str, revision: str) -> None:
        _, commit = self.repo(type, id, write=True).at(revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, there = asked["path"], commit.files.get(asked["path"])
            answer = {
                "path": path,
                "shouldIgnore": False,
                "uploadMode": "lfs" if path.endswith(LFS) else "regular",
            }
            if there:
                answer["oid"] = there.sha256 or there.oid
            answers.append(answer)
        self.send(200, {"files": answers})

    def lfs_batch(self, type: str | None, id: str) -> None:
        self.repo(type, id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.storage}/storage/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{id}.git/info/lfs/verify"},
                }
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "BadDigest", "the bytes do not have this sha256")
        self.hub.objects[oid] = self.body
        self.send(200, {})

    def lfs_verify(self, id: str) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "EntryNotFound", "no such object")
        self.send(200, {})

    def commit(self, type: str | None, id: str, revision: str) -> None:
        repo = self.repo(type, id, write=True)
        head, before = repo.at(revision)
        files, title = dict(before.files), ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise Refused(412, "", "A commit has happened since. Please refresh")
            elif key == "file":
                files[value["path"]] = File.of(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, "", f"no object {value['oid']}")
                files[value["path"]] = File.of(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"])
        sha = repo.commit(unquote(revision), title, files)
        url = f"{self.hub.url}/{'datasets/' if type else ''}{id}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url})

    # what lies in it

    def resolve(self, type: str | None, id: str, revision: str, path: str) -> None:
        repo = self.repo(type, id)
        sha, commit = repo.at(revision)
        if (file := commit.files.get(unquote(path))) is None:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 or file.oid}"'}
        if not file.sha256:
            self.send_ranged(file.data, headers)
            return
        headers["Location"] = f"{self.hub.storage}/cdn/object/{file.sha256}"
        headers["X-Linked-Size"], headers["X-Linked-Etag"] = str(len(file.data)), headers["ETag"]
        if file.sha256 in self.hub.xet.hash_of:
            route = f"{self.hub.url}/api/{type or 'models'}/{id}/xet-read-token/{sha}"
            headers["X-Xet-Hash"] = self.hub.xet.hash_of[file.sha256]
            headers["X-Xet-Refresh-Route"] = route
            headers["Link"] = f'<{route}>; rel="xet-auth"'
        self.send(302, b"", headers)

    def cdn(self, kind: str, name: str) -> None:
        data = (self.hub.objects if kind == "object" else self.hub.xet.xorbs)[name]
        self.hub.fetched += self.send_ranged(data, {"ETag": f'"{name}"'})

    # Xet

    def xet_token(self, type: str | None, id: str, right: str, revision: str) -> None:
        self.repo(type, id, write=right == "write")
        key, until = secrets.token_hex(16), int(time.time()) + 3600
        self.hub.xet_keys[key] = right
        headers = {
            "X-Xet-Cas-Url": f"{self.hub.url}/cas",
            "X-Xet-Access-Token": key,
            "X-Xet-Token-Expiration": str(until),
        }
        body = {"casUrl": f"{self.hub.url}/cas", "accessToken": key, "exp": until}
        self.send(200, body, headers)

    def _xet_right(self, right: str) -> None:
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.xet_keys.get(key) not in ("write", right):
            raise Refused(401, "", "no such Xet token")

    def xet_xorb(self, name: str) -> None:
        self._xet_right("write")
        new = name not in self.hub.xet.xorbs
        self.hub.xet.add_xorb(name, self.body)
        self.send(200, {"was_inserted": new})

    def xet_shard(self) -> None:
        self._xet_right("write")
        self.hub.xet.add_shard(self.body)
        for sha256, name in self.hub.xet.hash_of.items():
            self.hub.objects[sha256] = self.hub.xet.join(self.hub.xet.files[name])
        self.send(200, {"result": 1})

    def xet_file(self, name: str) -> None:
        self._xet_right("read")
        wanted = self.headers.get("Range")
        self.send(200, self.hub.xet.reconstruction(name, wanted, self.hub.storage))


ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("GET",), REPO, Handler.info),
    (("GET",), rf"{REPO}/revision/{REVISION}", Handler.info),
    (("GET",), rf"{REPO}/refs", Handler.refs),
    (("GET",), rf"{REPO}/tree/{REVISION}(/(?P<path>.+))?", Handler.tree),
    (("POST",), rf"{REPO}/paths-info/{REVISION}", Handler.paths_info),
    (("POST",), rf"{REPO}/preupload/{REVISION}", Handler.preupload),
    (("POST",), rf"{REPO}/commit/{REVISION}", Handler.commit),
    (("GET",), rf"{REPO}/xet-(?P<right>read|write)-token/{REVISION}", Handler.xet_token),
    (("POST",), rf"/((?P<type>datasets)/)?{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("POST",), rf"/{ID}\.git/info/lfs/verify", Handler.lfs_verify),
    (("PUT",), r"/storage/(?P<oid>\w+)", Handler.lfs_put),
    (("GET", "HEAD"), r"/cdn/(?P<kind>object|xorb)/(?P<name>\w+)", Handler.cdn),
    (("POST",), r"/cas/v1/xorbs/default/(?P<name>\w+)", Handler.xet_xorb),
    (("POST",), r"/cas/v1/shards", Handler.xet_shard),
    (("GET",), r"/cas/v1/reconstructions/(?P<name>\w+)", Handler.xet_file),
    (
        ("GET", "HEAD"),
        rf"/((?P<type>datasets)/)?{ID}/resolve/{REVISION}/(?P<path>.+)",
        Handler.resolve,
    ),
]
