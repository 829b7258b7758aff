"""Files that are wrong, each alone: what becomes of it, and that its neighbours do not notice."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speechfuse import artifact
from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.folder import Folder
from speechfuse.rows.rejects import Reject
from tests.bad_audio import FILES, IGNORED, RATE, make, sound

TOKEN = 1 / decoding.TOKEN_RATE


def kinds_of(corpus: Folder, shards: list[dict]) -> dict[str, str]:
    """{id: "used" or kind} after decoding, as the tokenizing job does it."""
    found: dict[str, str] = {}
    for shard in shards:
        for item in corpus.clips(shard):
            assert item.id not in found, "two items with one id"
            found[item.id] = kind_of(item)
    return found


def kind_of(item: Clip | Reject) -> str:
    if isinstance(item, Reject):
        return item.reason.partition(": ")[0]
    assert isinstance(item.audio, Path)
    try:
        waveform = decoding.decode(item.audio, item.offset, item.seconds).waveform
    except ValueError as error:
        assert str(item.audio.parent) not in str(error)
        return str(error).partition(": ")[0]
    assert waveform.dtype == np.float32 and waveform.ndim == 1 and np.isfinite(waveform).all()
    return "used" if len(waveform) / RATE >= TOKEN else "too short"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Folder, dict[str, str]]:
    path = tmp_path_factory.mktemp("bad")
    expected = make(path)
    return Folder(str(path)), expected


@pytest.fixture(scope="module")
def found(corpus) -> dict[str, str]:
    return kinds_of(corpus[0], corpus[0].plan(10))


NAMES = [
    *(Path(name).with_suffix("").as_posix() for name in FILES),
    *("40 minutes", "twice.wav", "folder", "pipe", "dangling", "loop", "link", "locked"),
    "caf\\xe9",
]


@pytest.mark.parametrize("id", NAMES)
def test_each_file_becomes_what_it_should(corpus, found, id):
    if id not in corpus[1]:
        pytest.skip("this file system has no such names")
    assert found[id] == corpus[1][id]


def test_nothing_else_is_found_and_nothing_is_lost(corpus, found):
    assert found.keys() == corpus[1].keys()
    kinds = set(corpus[1].values())
    assert sum(kind != "used" for kind in corpus[1].values()) >= 35 and len(kinds) >= 12
    assert corpus[0].ignored == IGNORED


def test_the_plan_counts_every_item_and_can_be_written_as_json(corpus, tmp_path):
    for size in (1, 7, 1000):
        plan = corpus[0].plan(size)
        assert sum(shard["count"] for shard in plan) == len(corpus[1])
        assert all(0 < shard["count"] <= size for shard in plan)
        assert corpus[0].ignored == IGNORED
        artifact.write_json(tmp_path / "plan.json", plan)
        read = json.loads((tmp_path / "plan.json").read_bytes().decode())
        assert read == plan
    whole = [item.id for shard in plan for item in corpus[0].clips(shard)]
    assert sorted(whole) == sorted(corpus[1])


def test_a_good_neighbour_has_its_samples_and_its_text(corpus):
    clips = [clip for shard in corpus[0].plan(7) for clip in corpus[0].clips(shard)]
    good = {clip.id: clip for clip in clips if isinstance(clip, Clip)}
    assert (good["good"].text, good["good too"].text) == ("a good one", "a good one too")
    assert good["stereo"].text is None
    for id in ("good", "link", "wav in a", "new\nline \u00e9\u4e2d", "rubbish behind"):
        waveform = decoding.decode(good[id].audio).waveform
        np.testing.assert_allclose(waveform, sound()[:, 0], atol=2**-15)
    assert len(decoding.decode(good["40 minutes"].audio).waveform) == 40 * 60 * RATE


DECODE = """
import sys
from pathlib import Path
from speechfuse.audio import decoding as audio
for name in Path(sys.argv[1]).rglob("*"):
    try:
        audio.decode(name.read_bytes() if name.is_file() and "pipe" not in name.name else name)
    except ValueError:
        pass
"""


def test_bytes_of_damaged_files_print_no_tracebacks(tmp_path):
    make(tmp_path, minutes=0.5)
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
