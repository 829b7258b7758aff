"""Put a finished artifact on the Hub, with its card.

In: an artifact folder. Out: one repository whose last commit holds all files of the manifest.
"""

import json
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from speechfuse import artifact
from speechfuse.hub.data import _api, _token, hub_errors
from speechfuse.tokens import weights
from speechfuse.tokens.vocabulary import read_speech

# such files go when the artifact no more has them: data_files and from_pretrained would find them
STRAY = ("shard-*", "*.safetensors", "*.safetensors.index.json")
BATCH = 50  # files; what a batch has sent is known to the Hub, whatever happens to the next


def push(
    folder: Path,
    repo: str,
    card: str,
    repo_type: str = "dataset",
    private: bool = True,
    message: str | None = None,
    dry_run: bool = False,
) -> str | None:
    """Make `repo` hold the finished artifact `folder` and its README.md, `card`; return the commit.

    Creates the repository where there is none. All files come in one commit; there is none when
    nothing differs. Shards and weights that the artifact does not have are removed, other files of
    the repository stay. Records the commit in pushed-NAME.json beside the folder. With `dry_run`
    it sends nothing and returns None. Raises ValueError when files are not what the manifest says,
    and when the Hub refuses.
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
    with hub_errors(repo):
        commit, changed = _commit(repo, repo_type, private, files, message or f"Push {folder.name}")
    record = {"repo": repo, "type": repo_type, "revision": commit, "private": private}
    record["fingerprint"] = artifact.fingerprint_of(folder)
    # beside the folder, whose content is the artifact's alone
    name = f"pushed-{folder.absolute().name}.json"
    artifact.write_json(folder.absolute().with_name(name), record)
    if changed:
        print(f"{folder}: {what} are {repo}@{commit} ({how})")
    else:
        print(f"{folder}: {repo}@{commit} ({how}) has exactly this, nothing to do")
    return commit


def own_name() -> str:
    """Return the name of the account that the token belongs to."""
    _needs_token()
    with hub_errors("your account"):
        return _api().whoami()["name"]


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a finished artifact by their path in it, its manifest among them.

    Reads each once. Raises ValueError for one that is missing, has another sha256 than the manifest
    says or leads out of the folder. An epoch has no list of its own: its files are all that are
    there, but for weights that its model does not have; its run's list has the weights. Of one
    with a speech part that alone is sent: the language model beside it is another's, untouched.
    """
    hashes: dict[str, Any] | None = artifact.manifest_of(folder).get("outputs")
    if hashes is None:
        run = folder.parent / "manifest.json"
        outputs = json.loads(run.read_text("utf-8"))["outputs"] if run.exists() else {}
        names = {p.name for p in folder.iterdir() if p.is_file() and p.name[0] != "."}
        names |= {*(part := weights.speech_part(folder))}
        if part and (base := read_speech(folder)["base"]):
            print(f"{folder}: the language model is {base}, and is not sent")
            names = {*part}
        others = {n for n in names if fnmatch(n, "*.safetensors")}
        others -= {*weights.files(folder), *part}
        names -= {"README.md", *others}
        for name in sorted(others):
            print(f"{folder}: {name} is none of the model's weights, and is not sent")
        hashes = {name: outputs.get(f"{folder.name}/{name}") for name in sorted(names)}
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
) -> tuple[str, bool]:
    """Return the last commit of `repo`, and whether it is a new one: one commit, or none.

    Not upload_folder: by Xet it commits every 5 minutes and every 250 files, so that readers and an
    interrupted push would see half a dataset.
    """
    api = _api()
    api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
    info = api.repo_info(repo, repo_type=repo_type)
    if bool(info.private) != private:
        is_now, asked = ("private", "false") if info.private else ("public", "true")
        raise ValueError(
            f"{repo} is there and {is_now}, but private={asked} is asked for: give the other "
            "value or another repo, or change it in its settings on the Hub"
        )
    tree = api.list_repo_tree(repo, recursive=True, repo_type=repo_type, revision=info.sha)
    remote = {entry.path: entry.lfs for entry in tree if isinstance(entry, RepoFile)}
    additions = [CommitOperationAdd(name, file) for name, file in files.items()]
    additions = [  # create_commit drops unchanged files as well, but only once it has sent them
        addition
        for addition in additions
        if not (lfs := remote.get(addition.path_in_repo))
        or lfs.sha256 != addition.upload_info.sha256.hex()
    ]
    stray = [p for p in remote if p not in files and any(fnmatch(p, pattern) for pattern in STRAY)]
    for i in range(0, len(additions), BATCH):
        batch = additions[i : i + BATCH]
        api.preupload_lfs_files(repo, batch, repo_type=repo_type, free_memory=False)
    commit = api.create_commit(  # makes none where nothing has changed
        repo,
        [*additions, *(CommitOperationDelete(path) for path in stray)],
        commit_message=message,
        repo_type=repo_type,
        parent_commit=info.sha,
    )
    return commit.oid, commit.oid != info.sha


def _needs_token() -> None:
    if not _token():
        raise ValueError(
            "HF_TOKEN is not set: put a token that may write into the environment; "
            "https://huggingface.co/settings/tokens makes them"
        )
