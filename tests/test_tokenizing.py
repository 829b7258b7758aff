"""One shard: order and codes whatever the threads, bounded look-ahead, reduced precision."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from speechfuse import workers
from speechfuse.audio import espeak_ng
from speechfuse.corpora.clip import Clip
from speechfuse.quantizer import tokenize
from speechfuse.quantizer.model import Quantizer, QuantizerConfig
from speechfuse.quantizer.spec import settled
from speechfuse.rows.rejects import Reject
from tests.bad_audio import encoded, sound

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    torch.set_num_threads(1)
    return Quantizer.load(ROOT / "recipes/demo/models/quantizer")


@pytest.fixture(scope="module")
def clips() -> list[Clip | Reject]:
    texts = ["one", "two and three", "where does a bee live", "seven", "nine plus six " * 6]
    with espeak_ng.EspeakLibrary() as engine:
        spoken = [engine.speak(t, espeak_ng.EspeakVoice("en-us+Annie")).waveform for t in texts]
    made: list[Clip | Reject] = [
        Clip(f"clip-{i}", waveform, "here", text=text)
        for i, (text, waveform) in enumerate(zip(texts, spoken, strict=True))
    ]
    made[1:1] = [Reject("bad", "bad name: so it came"), Clip("text", b"no audio", "there")]
    return [*made, Clip("click", np.zeros(100, np.float32), "here")]


def test_rows_are_the_same_whatever_the_threads_and_the_look_ahead(quantizer, clips):
    shards = [
        tokenize.tokenize(clips, quantizer, 2, [], threads, depth)
        for threads, depth in product((1, 3), (1, 100))
    ]
    first = shards[0]
    pieces = [row["id"] for row in first.rows]
    assert pieces[:4] == [f"clip-{i}" for i in range(4)] and pieces[4:6] == ["clip-4#0", "clip-4#1"]
    assert [r["id"] for r in first.rejects] == ["bad", "text", "click"]
    assert [r["reason"].partition(":")[0] for r in first.rejects] == [
        "bad name",
        "not audio",
        "too short",
    ]
    assert first.counts["split"] == 1 and first.counts["pieces"] == len(pieces) - 4
    for other in shards[1:]:
        assert other.rejects == first.rejects and other.counts == first.counts
        for a, b in zip(other.rows, first.rows, strict=True):
            np.testing.assert_array_equal(a["codes"], b["codes"])
            assert {k: a[k] for k in a if k != "codes"} == {k: b[k] for k in b if k != "codes"}


def test_a_clip_padded_to_the_next_second_has_its_codes_whatever_stands_beside_it(clips, tmp_path):
    torch.manual_seed(0)
    config = QuantizerConfig(64, 8, 2, True, 80, 250, 16, 2, 1, ffn_mult=1, pad_to=1.0)
    quantizer = Quantizer(config).eval()
    torch.nn.init.normal_(quantizer.codebook)
    assert quantizer.mlp[0].out_features == 16
    assert [quantizer.padded_frames(n) for n in (1, 100, 101, 499)] == [100, 100, 200, 500]
    shard = tokenize.tokenize(clips, quantizer, 2, [], 1, 1)
    assert [r["id"] for r in shard.rows[:4]] == [f"clip-{i}" for i in range(4)]
    waves = [clip.audio for clip in clips if isinstance(clip, Clip) and clip.id[-1] in "0123"]
    for row, alone, beside in zip(
        shard.rows,
        [quantizer.encode([wave], 2)[0] for wave in waves],
        quantizer.encode(waves, 2),
        strict=False,
    ):
        np.testing.assert_array_equal(row["codes"], alone)
        np.testing.assert_array_equal(beside, alone)
    with pytest.raises(ValueError, match=r"pad_to=0\.7: give a multiple of 0\.04 s that divides"):
        replace(config, pad_to=0.7)
    assert replace(config, pad_to=0.2).pad_to == 0.2  # which divides 5 s, but not in floating point
    identities = set()
    for int8 in (False, True):
        quantizer.int8 = int8
        quantizer.save(tmp_path / str(int8))
        read = Quantizer.load(tmp_path / str(int8))
        for name, tensor in read.state_dict().items():
            assert torch.allclose(tensor, quantizer.state_dict()[name], atol=0.02), name
        identities.add(read.identity)
    sizes = [(tmp_path / each / "model.safetensors").stat().st_size for each in ("False", "True")]
    assert len(identities) == 2 and quantizer.identity in identities and sizes[1] < sizes[0]
    read.int8 = True
    read.save(tmp_path / "again")
    assert Quantizer.load(tmp_path / "again").identity == read.identity


def test_no_piece_has_an_id_of_another_clip(quantizer, clips):
    long = clips[-2]
    made = tokenize.tokenize([long], quantizer, 2, [], 1, 8, {"clip-4#1", "clip-4#0", "clip-4#0#"})
    assert [row["id"] for row in made.rows][:2] == ["clip-4#0##", "clip-4#1#"]
    assert {row["parent"] for row in made.rows} == {"clip-4"}


def test_each_row_has_the_codes_of_its_own_audio(quantizer, clips):
    """Three clips in batches of two: the second batch is fetched late and half empty."""
    three = [clip for clip in clips if isinstance(clip, Clip)][2:5]
    made = tokenize.tokenize(three[:3], quantizer, 2, [], 1, 8)
    for row, clip in zip(made.rows, three, strict=False):
        (alone,) = quantizer.encode([clip.audio], 2)
        assert len(row["codes"]) == len(alone) == int(25 * len(clip.audio) / 16_000)
        assert np.mean(row["codes"] == alone) > 0.98  # near-ties may fall otherwise


def test_a_clip_of_which_one_channel_is_used_is_counted_and_has_its_codes(quantizer):
    voice = sound(1.0)[:, 0]
    files = [np.stack([voice, -voice], axis=1), voice, np.stack([voice, voice], axis=1)]
    clips = [
        Clip(f"{i}", encoded(each, subtype="FLOAT"), f"{i}.wav") for i, each in enumerate(files)
    ]
    shard = tokenize.tokenize(clips, quantizer, 2, [], 1, 4)
    assert (shard.counts["mixed_down"], shard.counts["one_channel"]) == (2, 1)
    for row in shard.rows:
        np.testing.assert_array_equal(row["codes"], shard.rows[1]["codes"])


def test_no_more_clips_are_opened_than_the_look_ahead_allows():
    opened = []

    def items():
        for i in range(50):
            opened.append(i)
            yield i

    for taken, result in enumerate(workers.prefetch(lambda i: i * i, items(), 2, 5)):
        assert result == taken**2
        assert len(opened) <= taken + 6
    assert len(opened) == 50


def test_a_filter_drops_with_its_own_kind_of_reason(quantizer, clips):
    def short_text(waveform: np.ndarray, text: str | None) -> str | None:
        return "text length: under 5 letters" if len(text or "") < 5 else None

    made = tokenize.tokenize(clips, quantizer, 2, [short_text], 2, 8)
    dropped = {r["id"]: r["reason"] for r in made.rejects if r["reason"].startswith("filter ")}
    assert dropped == dict.fromkeys(["clip-0", "click"], "filter text length: under 5 letters")
    assert "clip-0" not in [row["id"] for row in made.rows]


def test_bfloat16_is_compared_with_float32_on_the_first_clips(quantizer, clips):
    rng = np.random.default_rng(0)
    hiss = [rng.uniform(-1, 1, 32_000).astype(np.float32) for _ in range(9)]
    noise = [Clip(f"noise-{i}", waveform, "") for i, waveform in enumerate(hiss)]
    clips = [*clips, *noise]  # hum and hiss have near-ties, where precision decides
    n = sum(len(row["codes"]) for row in tokenize.tokenize(clips, quantizer, 2, [], 1, 1).rows)
    assert tokenize.exactness(clips, quantizer, 2) == (n, n)
    assert n / 9 < tokenize.exactness(clips, quantizer, 2, enough=n // 4)[1] < n / 2
    quantizer.dtype = torch.bfloat16
    try:
        equal, codes = tokenize.exactness(clips, quantizer, 2)
        assert quantizer.dtype == torch.bfloat16
    finally:
        quantizer.dtype = torch.float32
    assert codes == n and 0.5 * n < equal < n


def test_a_window_that_is_null_is_no_part_of_what_a_job_made():
    settings = {"quantizer": {"checkpoint": "a", "window": None}, "window": None, "seed": 0}
    assert settled(settings) == {"quantizer": {"checkpoint": "a"}, "seed": 0}
    assert settled({"quantizer": {"window": 5.0}}) == {"quantizer": {"window": 5.0}}
    assert settled({"quantizer": "a", "window": 5.0}) == {"quantizer": "a", "window": 5.0}
