"""About half a minute of `just prove fuzz`: random mutations of valid files, the same each time."""

from pathlib import Path

import pytest

from tests import fuzzing

MUTATIONS = 40  # of each format


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def seeds(folder) -> dict[str, fuzzing.Seed]:
    return {seed.format: seed for seed in fuzzing.seeds(folder)}


FORMATS = (
    *("wav", "wav stereo", "flac", "mp3", "ogg", "opus", "m4a", "nemo manifest", "nemo tar"),
    *("webdataset tar", "parquet audio", "parquet text", "json lines", "json array", "synthetic"),
    "yaml",
)


def test_every_format_is_tried(seeds):
    assert sorted(seeds) == sorted(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_no_mutation_is_a_fault(format, folder, seeds, monkeypatch, capfd):
    monkeypatch.chdir(fuzzing.ROOT)
    seed = seeds[format]
    original = (folder / seed.name).read_bytes()
    if format != "m4a" or fuzzing.shutil.which("ffmpeg"):
        assert fuzzing.try_one(seed, original, folder) == "read"
    for number in range(MUTATIONS):
        fuzzing.try_one(seed, fuzzing.mutation(seed, original, number), folder)


def test_text_with_the_audio_of_another_clip_is_a_fault():
    first, second = fuzzing.HERTZ[:2]
    fuzzing.check_pair(fuzzing.text_of(first), fuzzing.tone(first))
    with pytest.raises(fuzzing.Fault, match="the audio is 700 Hz"):
        fuzzing.check_pair(fuzzing.text_of(first), fuzzing.tone(second))


def test_a_reader_that_hangs_or_breaks_is_a_fault(folder, seeds, monkeypatch):
    def hangs(path: Path) -> str:
        while True:
            pass

    def breaks(path: Path) -> str:
        return {}[path]

    monkeypatch.setattr(fuzzing, "TIME_LIMIT", 1)
    for read, why in ((hangs, "it takes over 1 s"), (breaks, "KeyError")):
        seed = fuzzing.Seed("wav", seeds["wav"].name, read)
        with pytest.raises(fuzzing.Fault, match=why):
            fuzzing.try_one(seed, b"", folder)


def test_the_name_of_a_column_that_is_no_text_is_a_reject(seeds, folder):
    """Mutation 1982 of the 100,000, which no reader had met."""
    seed = seeds["parquet audio"]
    content = fuzzing.mutation(seed, (folder / seed.name).read_bytes(), 1982)
    assert fuzzing.try_one(seed, content, folder) == "rejected"
