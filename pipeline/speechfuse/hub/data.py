"""Reading from the Hub: a dataset at a commit.

In: owner/name@revision. Out: its commit, its files on this disk, or a filesystem that reads ranges
of them. The token is read from the environment (HF_TOKEN) and from nowhere else.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import HfApi, HfFileSystem, RepoCard, constants, errors, snapshot_download

from speechfuse import artifact

PATH = re.compile(r"([\w.-]+/[\w.-]+)@([^@]+)")
_NO_CONNECTION = (
    errors.HTTPError,
    errors.OfflineModeIsEnabled,
    errors.RevisionResolutionError,
    errors.LocalEntryNotFoundError,
)


class NoConnection(ValueError):
    """The Hub cannot be reached, and what is asked for is not in its cache on this disk."""


def resolve(repo: str, revision: str) -> str:
    """Return the commit, 40 hex digits, that a branch, tag or commit of a dataset names now;
    without a connection, the one it named when last seen. Raises ValueError where there is none."""
    with hub_errors(f"{repo}@{revision}"):
        return _api().resolve_revision(repo, repo_type="dataset", revision=revision).resolved


def filesystem() -> HfFileSystem:
    """Return an fsspec filesystem in which the files of a dataset lie under
    datasets/{repo}@{commit}. Only the ranges that are read are fetched. Opening a file that is not
    there raises FileNotFoundError."""
    return HfFileSystem(token=_token())


def pinned(path: str, out: Path | None = None) -> str | None:
    """Resolve owner/name@revision to owner/name@commit; return None for the path of a folder. A job
    that has already started in `out` keeps the commit of its input `path`."""
    if not (match := _on_hub(path)):
        return None
    return pinned_commit(f"{match[1]}@{resolve(match[1], match[2])}", path, out)


def pinned_commit(now: str, name: str, out: Path | None) -> str:
    """Return the owner/name@commit of the input `name`: the one in plan.json if the artifact `out`
    was started, else `now`. Prints a notice if the branch has moved since. An input of plan.json
    that is not this repository gives `now` as well."""
    record = artifact.record_of(out) if out else {}
    before = str(record.get("inputs", {}).get(name, now))
    if before == now or not before.startswith(f"{now.partition('@')[0]}@"):
        return now
    print(f"{name} has moved: {out} was begun with {before} and stays with it; now it is {now}")
    return before


def local(path: str) -> Path:
    """Return the folder that `path` names. The files of owner/name@revision are fetched once into
    the cache of huggingface_hub (HF_HOME). Raises ValueError where they cannot be had."""
    if not (match := _on_hub(path)):
        return Path(path)
    repo, commit = match[1], resolve(match[1], match[2])
    with hub_errors(path):
        return Path(snapshot_download(repo, repo_type="dataset", revision=commit, token=_token()))


def licence_on(card: str) -> str | None:
    """Return the licence that a card states, several as "mit and cc-by-4.0" and "other" by its
    name; None where it states none. One of several that is no text is "unknown"."""
    try:
        data = RepoCard(card.removeprefix("\ufeff"), ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):
        return None
    stated = data.get("license")
    names = stated if isinstance(stated, list) else [stated]
    names = [data.get("license_name") or name if name == "other" else name for name in names]
    texts = dict.fromkeys(name if isinstance(name, str) else "unknown" for name in names)
    return " and ".join(texts) if any(isinstance(name, str) for name in names) else None


def _on_hub(path: str) -> re.Match[str] | None:
    return None if Path(path).exists() else PATH.fullmatch(path)


def _token() -> str | bool:
    # False: not the one that huggingface_hub keeps in a file either
    return os.environ.get("HF_TOKEN", "").strip() or False


def _api() -> HfApi:
    return HfApi(token=_token())


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Convert errors of the Hub and the network to a ValueError of one sentence about `what`."""
    token = "HF_TOKEN has no right to it" if _token() else "HF_TOKEN is not set"
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"{what}: the Hub has no such repository, or {token}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{what}: no such branch, tag or commit in the repository") from error
    except errors.HfHubHTTPError as error:
        why = {
            401: "HF_TOKEN is not a valid token" if _token() else token,
            403: token,
            412: "somebody else has committed to it in the meantime; run it again",
        }.get(error.response.status_code, f"the Hub said: {error}")
        raise ValueError(f"{what}: {why}") from error
    except _NO_CONNECTION as error:
        raise NoConnection(
            f"{what}: no connection to {constants.ENDPOINT}, and it is not in the cache: {error}"
        ) from error
    except (ConnectionError, RuntimeError) as error:  # of a file on its way: by Xet, by LFS
        raise ValueError(
            f"{what}: the transfer stopped ({error.__cause__ or error}); run it again, what has "
            "arrived is not sent twice"
        ) from error
