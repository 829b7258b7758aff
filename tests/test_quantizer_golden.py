"""Our WhisperVQ inference against codes made by the genuine whisperspeech: equal token for token.

The golden files and how they were made: golden/make_whisperspeech_golden.py, and for codes on the
genuine tiny.en golden/make_tiny_en_golden.py.
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from speechfuse.quantizer.model import Quantizer

GOLDEN = Path(__file__).parent / "golden"
MAKER = runpy.run_path(str(GOLDEN / "make_whisperspeech_golden.py"))
RECORDED = json.loads((GOLDEN / "whisperspeech_codes.json").read_text())
CLIPS: dict[str, np.ndarray] = MAKER["clips"]()
CODES = {name: np.array(clip["codes"]) for name, clip in RECORDED["clips"].items()}
LAYOUTS = ("whispervq.model", "whispervq-fixed.model")


def published(layout: str) -> Quantizer:
    return Quantizer.load(GOLDEN / layout, whisper=GOLDEN / "whisper.pt")


@pytest.fixture(scope="module", params=LAYOUTS)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return published(request.param)


def check(quantizer: Quantizer, names: list[str], batch_size: int) -> None:
    encoded = quantizer.encode([CLIPS[name] for name in names], batch_size)
    assert len(encoded) == len(names)
    for name, codes in zip(names, encoded, strict=True):
        assert codes.dtype == np.uint16
        np.testing.assert_array_equal(codes, CODES[name], err_msg=f"clip of {name} s")


def test_golden_data_can_fail_a_wrong_quantizer() -> None:
    assert {name: MAKER["checksum"](clip) for name, clip in CLIPS.items()} == {
        name: clip["sha256"] for name, clip in RECORDED["clips"].items()
    }, "the clips are not the ones that whisperspeech encoded"
    seconds = {name: len(clip) / 16_000 for name, clip in CLIPS.items()}
    assert len(CLIPS) >= 8
    assert min(seconds.values()) == 0.5
    assert max(seconds.values()) == 30.0
    # a token takes 40 ms: 2.99 and 3.01 s stand on the two sides of a border
    assert [len(CODES[name]) for name in ("2.99", "3.01", "29.98", "30.0")] == [74, 75, 749, 750]
    assert all(len(CODES[name]) == int(25 * s + 1e-6) for name, s in seconds.items())
    heard = np.concatenate(list(CODES.values()))
    assert len(np.unique(heard)) >= 60
    assert np.bincount(heard).max() < 0.05 * len(heard)
    assert heard.max() == 512, "the mask code takes part in the search and must be among them"
    one, other = CODES["29.98"], CODES["30.0"][:749]
    assert np.mean(one == other) < 0.5, "codes say where they are, not what is heard"
    assert RECORDED["made_with"]["whisperspeech"] == "0.8.9"
    assert RECORDED["margin"] >= 1e-4, "near-ties: codes would depend on the machine"


def test_fixed_layout_is_that_of_a_newer_vector_quantize_pytorch() -> None:
    vq = pytest.importorskip("vector_quantize_pytorch")
    content = torch.load(GOLDEN / "whispervq-fixed.model", weights_only=True)
    reference = vq.ResidualVQ(
        dim=128, codebook_size=513, codebook_dim=64, num_quantizers=1, use_cosine_sim=True
    )
    ours = {key[3:]: t for key, t in content["state_dict"].items() if key.startswith("rq.")}
    reference.load_state_dict(ours, strict=True)


@pytest.mark.parametrize("name", CLIPS)
def test_one_by_one(quantizer: Quantizer, name: str) -> None:
    check(quantizer, [name], batch_size=1)


def test_all_lengths_in_one_batch(quantizer: Quantizer) -> None:
    check(quantizer, list(CLIPS), batch_size=len(CLIPS))


@pytest.mark.parametrize(("seed", "batch_size"), [(0, 2), (1, 4)])
def test_shuffled_batches(quantizer: Quantizer, seed: int, batch_size: int) -> None:
    check(quantizer, np.random.default_rng(seed).permutation(list(CLIPS)).tolist(), batch_size)


def test_both_layouts_have_one_identity_and_other_weights_another() -> None:
    old, fixed = map(published, LAYOUTS)
    assert old.identity == fixed.identity
    for part in ("encoder.conv1.bias", "mlp.0.bias", "project_in.bias", "codebook"):
        tensor = fixed.state_dict()[part]
        value = tensor.clone()
        tensor.view(-1)[0] += 1
        assert fixed.identity != old.identity, part
        tensor.copy_(value)
    assert old.identity == fixed.identity


def test_our_own_format_keeps_identity_and_codes(tmp_path: Path) -> None:
    quantizer = published(LAYOUTS[0])
    quantizer.save(tmp_path / "quantizer")
    again = Quantizer.load(tmp_path / "quantizer")
    assert again.identity == quantizer.identity
    check(again, list(CLIPS), batch_size=4)


@pytest.mark.parametrize("samples", [480_001, 960_000])
def test_clip_over_the_window_is_refused(quantizer: Quantizer, samples: int) -> None:
    assert quantizer.window == 30.0
    with pytest.raises(ValueError, match="30 s"):
        quantizer.encode([CLIPS["0.5"], np.zeros(samples, np.float32)])


ON_TINY_EN = json.loads((GOLDEN / "tiny_en_codes.json").read_text())


@pytest.mark.parametrize("window", ON_TINY_EN["codes"])
def test_codes_on_the_genuine_tiny_en(tiny_en: Path, window: str, tmp_path: Path) -> None:
    maker = runpy.run_path(str(GOLDEN / "make_tiny_en_golden.py"))
    content = {"config": maker["CONFIG"], "tunables": maker["TUNABLES"]}
    content["state_dict"] = maker["bottleneck"](ON_TINY_EN["bias"])
    torch.save(content, tmp_path / "golden.model")
    quantizer = Quantizer.load(tmp_path / "golden.model", tiny_en, float(window))
    assert quantizer.window == float(window)
    expected, waveforms = ON_TINY_EN["codes"][window], maker["clips"]()
    encoded = quantizer.encode([waveforms[name] for name in expected])
    for (name, codes), found in zip(expected.items(), encoded, strict=True):
        np.testing.assert_array_equal(found, codes, err_msg=f"clip of {name} s")


def test_golden_codes_on_tiny_en_can_fail_a_wrong_quantizer() -> None:
    whole, cut = ON_TINY_EN["codes"]["30.0"], ON_TINY_EN["codes"]["5.0"]
    assert len(whole) == 8 and len(cut) == 6 and set(cut) < set(whole)
    assert all(len(codes) == int(25 * float(name) + 1e-6) for name, codes in whole.items())
    assert all(cut[name] != whole[name] for name in cut), "the window must matter"
    heard = np.concatenate([*whole.values(), *cut.values()])
    assert len(np.unique(heard)) >= 60 and np.bincount(heard).max() < 0.2 * len(heard)
    assert ON_TINY_EN["margin"] >= 1e-4 and ON_TINY_EN["made_with"]["whisperspeech"] == "0.8.9"
