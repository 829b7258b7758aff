"""The Hub, and the one door to it: data at a commit in, finished artifacts out.

In: owner/name@revision. Out: its commit, its files on this disk, or a filesystem that reads ranges
of them. And: a finished artifact with its card becomes one commit; until that commit is there
nothing of it can be seen, and what an interrupted push has sent is not sent again.

The token is read from the environment (HF_TOKEN) and from nowhere else.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile

from speechfuse import artifact

PATH = re.compile(r"([\w.-]+/[\w.-]+)@([^@]+)")
# such files go when the artifact no more has them: data_files and from_pretrained would find them
STRAY = ("shard-*", "*.safetensors", "*.safetensors.index.json")
BATCH = 50  # files; what a batch has sent is known to the Hub, whatever happens to the next


def resolve(repo: str, revision: str, repo_type: str = "dataset") -> str:
    """The commit, 40 hex digits, that a branch, tag or commit of a repository is now. Without a
    connection, what it was when last seen. ValueError where there is none."""
    with told(f"{repo}@{revision}"):
        found = _api().resolve_revision(repo, repo_type=repo_type, revision=revision)
    return found.resolved


def filesystem(repo: str, commit: str) -> HfFileSystem:
    """An fsspec filesystem in which the files of a dataset lie under datasets/{repo}@{commit}. Only
    the ranges that are read are fetched. What it cannot find is a FileNotFoundError."""
    return HfFileSystem(token=_token())


def pinned(path: str, out: Path | None = None) -> str | None:
    """owner/name@commit for owner/name@revision; None for the path of a folder. `out`: as `kept`,
    where the input has the name `path`."""
    if not (match := _on_hub(path)):
        return None
    return kept(f"{match[1]}@{resolve(match[1], match[2])}", path, out)


def kept(now: str, name: str, out: Path | None) -> str:
    """The owner/name@commit that an artifact stays with: once `out` is begun, the one that stands
    as input `name` in its plan.json, else `now`. Where the branch has moved since, that is said and
    makes no difference. What is not on the Hub is given back as it is."""
    plan = out / "plan.json" if out else None
    record = json.loads(plan.read_text("utf-8")) if plan and plan.exists() else {}
    before = str(record.get("inputs", {}).get(name, now))
    if before == now or not before.startswith(f"{now.partition('@')[0]}@"):
        return now
    print(f"{name} has moved: {out} was begun with {before} and stays with it; now it is {now}")
    return before


def local(path: str) -> Path:
    """The folder that `path` names; of owner/name@revision the files of that commit, fetched once
    into the cache of huggingface_hub (HF_HOME). ValueError where they cannot be had."""
    if not (match := _on_hub(path)):
        return Path(path)
    commit = resolve(match[1], match[2])
    with told(path):
        place = snapshot_download(match[1], repo_type="dataset", revision=commit, token=_token())
    return Path(place)


def push(
    folder: Path,
    repo: str,
    card: str,
    repo_type: str = "dataset",
    private: bool = True,
    message: str | None = None,
    dry_run: bool = False,
) -> str | None:
    """Make `repo` hold the finished artifact `folder` and its README.md, `card`. Gives the commit.

    The repository is made where there is none. All files come in one commit; there is none when
    nothing differs. Files of others stay, shards and weights that the artifact does not have go.
    The commit is recorded in pushed-NAME.json beside the folder. `dry_run` sends nothing.
    ValueError when files are not what the manifest says, and when the Hub refuses.
    """
    files: dict[str, Path | bytes] = {**files_of(folder), "README.md": card.encode()}
    sizes = {k: len(f) if isinstance(f, bytes) else f.stat().st_size for k, f in files.items()}
    how = f"{repo_type}, {'private' if private else 'public'}"
    what = f"{len(files):,} files, {sum(sizes.values()):,} bytes"
    if dry_run:
        print("\n".join(f"{size:>15,}  {name}" for name, size in sorted(sizes.items())))
        print(f"{folder}: {what} would go to {repo} ({how}); nothing was sent")
        return None
    _needs_token()
    with told(repo):
        commit, changed = _commit(repo, repo_type, private, files, message or f"Push {folder.name}")
    manifest = artifact.manifest_of(folder)
    record = {
        "repo": repo, "type": repo_type, "revision": commit, "private": private,
        "fingerprint": manifest["fingerprint"],
    }  # fmt: skip
    artifact.write_json(record_of(folder), record)
    if changed:
        print(
            f"{folder}: {what} are {repo}@{commit} ({how}); {changed:,} files were added, changed "
            "or removed"
        )
    else:
        print(f"{folder}: {repo}@{commit} ({how}) has exactly this, nothing to do")
    return commit


def record_of(folder: Path) -> Path:
    """Where a push is recorded: beside the folder, whose content is the artifact's alone."""
    return folder.absolute().with_name(f"pushed-{folder.absolute().name}.json")


def own_name() -> str:
    """Whose token it is."""
    _needs_token()
    with told("your account"):
        return _api().whoami()["name"]


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a finished artifact by their path in it, its manifest among them.

    All are read once: ValueError for one that is missing, has another sha256 than the manifest says
    or leads out of the folder. An epoch has no list of its own; its run's has the weights.
    """
    hashes: dict[str, Any] | None = artifact.manifest_of(folder).get("outputs")
    if hashes is None:
        run = folder.parent / "manifest.json"
        known = json.loads(run.read_text("utf-8"))["outputs"] if run.exists() else {}
        inside = (p.name for p in folder.iterdir() if p.is_file() and p.name[0] != ".")
        hashes = {name: known.get(f"{folder.name}/{name}") for name in sorted(inside)}
        hashes.pop("README.md", None)
    files = {}
    for name, sha256 in {**hashes, "manifest.json": None}.items():
        path = folder / name
        parts = PurePosixPath(name).parts
        if ".." in parts or parts[0] == "/" or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder}: {name} of its manifest leads out of the folder")
        if not path.is_file():
            raise ValueError(f"{folder}: {name} of its manifest is not there; make it again")
        if sha256 and artifact.sha256_of(path) != sha256:
            raise ValueError(
                f"{folder}: {name} has another sha256 than its manifest says: it was changed after "
                "the job ended; make it again"
            )
        files[name] = path
    return files


def _commit(
    repo: str, repo_type: str, private: bool, files: dict[str, Path | bytes], message: str
) -> tuple[str, int]:
    """(commit, files that were changed for it): one commit, or none."""
    api = _api()
    api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
    info = api.repo_info(repo, repo_type=repo_type)
    if bool(info.private) != private:
        is_now, wanted = ("private", "false") if info.private else ("public", "true")
        raise ValueError(
            f"{repo} is there and {is_now}, but private={wanted} is asked for: give the other "
            "value or another repo, or change it in its settings on the Hub"
        )
    tree = api.list_repo_tree(repo, recursive=True, repo_type=repo_type, revision=info.sha)
    there = {file.path: file for file in tree if isinstance(file, RepoFile)}
    new = [
        CommitOperationAdd(name, file if isinstance(file, bytes) else str(file))
        for name, file in files.items()
        if name not in there or not _same(there[name], file)
    ]
    stray = [p for p in there if p not in files and any(fnmatch(p, pattern) for pattern in STRAY)]
    if not new and not stray:
        return str(info.sha), 0
    for i in range(0, len(new), BATCH):
        some = new[i : i + BATCH]
        api.preupload_lfs_files(repo, some, repo_type=repo_type, free_memory=False)
    done = api.create_commit(
        repo,
        [*new, *(CommitOperationDelete(path) for path in stray)],
        commit_message=message,
        repo_type=repo_type,
        parent_commit=info.sha,
    )
    return done.oid, len(new) + len(stray)


def _same(there: RepoFile, file: Path | bytes) -> bool:
    data = file if isinstance(file, bytes) else None
    if there.lfs:
        found = hashlib.sha256(data).hexdigest() if data else artifact.sha256_of(Path(str(file)))
        return found == there.lfs.sha256
    data = Path(str(file)).read_bytes() if data is None else data
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == there.blob_id


def _on_hub(path: str) -> re.Match[str] | None:
    return None if Path(path).exists() else PATH.fullmatch(path)


def _token() -> str | bool:
    # False: not the one that huggingface_hub keeps in a file either
    return os.environ.get("HF_TOKEN", "").strip() or False


def _needs_token() -> None:
    if not _token():
        raise ValueError(
            "HF_TOKEN is not set: put a token that may write into the environment; "
            "https://huggingface.co/settings/tokens makes them"
        )


def _api() -> HfApi:
    return HfApi(token=_token())


@contextmanager
def told(what: str) -> Iterator[None]:
    """What the Hub or the network refuses, as a ValueError of one sentence."""
    token = "HF_TOKEN has no right to it" if _token() else "HF_TOKEN is not set"
    try:
        yield
    except RepositoryNotFoundError as error:
        raise ValueError(f"{what}: the Hub has no such repository, or {token}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what}: no such branch, tag or commit in the repository") from error
    except HfHubHTTPError as error:
        why = {
            401: "HF_TOKEN is not a valid token" if _token() else token,
            403: token,
            412: "somebody else has committed to it in the meantime; run it again",
        }.get(error.response.status_code, f"the Hub said: {error}")
        raise ValueError(f"{what}: {why}") from error
    except (HTTPError, OfflineModeIsEnabled, RevisionResolutionError, LocalEntryNotFoundError) as e:
        raise ValueError(
            f"{what}: no connection to {constants.ENDPOINT}, and it is not in the cache: {e}"
        ) from e
    except (ConnectionError, RuntimeError) as error:  # of a file on its way: by Xet, by LFS
        raise ValueError(
            f"{what}: the transfer stopped ({error.__cause__ or error}); run it again, what has "
            "arrived is not sent twice"
        ) from error
