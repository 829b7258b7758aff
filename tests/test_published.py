"""Checkpoints of others: the sound tokens of a published Ichigo or Llama3-s are kept with their
rows, what is not whole is refused before anything is written. The fixtures are small, but made as
the published ones were: transformers' add_tokens and resize_token_embeddings."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechfuse import artifact
from speechfuse.hub import cards
from speechfuse.quantizer.model import Quantizer
from speechfuse.tokens import expansion
from speechfuse.tokens.vocabulary import Vocabulary, read_config
from speechfuse.train import loop
from stages import ask, expand_vocab
from tests.small_training import STREAM, job, losses, make_parts, recipe
from tests.test_vocab import INITIALIZE, TEXT, checkpoint, init_base

ROOT = Path(__file__).parent.parent
QUANTIZER = ROOT / "recipes/demo/models/quantizer"
CODES = 512  # of that quantizer
DELIMITERS = ["<|sound_start|>", "<|sound_end|>"]
SOUNDS = [f"<|sound_{code:04d}|>" for code in range(CODES + 1)]
MATRICES = ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    tokenizer = init_base.train_tokenizer(["one two three", "user assistant"], vocab_size=256)
    return checkpoint(tmp_path_factory.mktemp("plain"), tokenizer)


def publish(
    base: Path,
    folder: Path,
    names: list[str],
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    """Give `base` tokens as the original's README did: delimiters are special, sounds are not. Its
    rows are then trained: no two are alike."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in names:
        tokenizer.add_tokens([AddedToken(name, special=name in DELIMITERS)], name in DELIMITERS)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows or len(tokenizer))
    with torch.no_grad():
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            matrix.weight.normal_(generator=torch.Generator().manual_seed(len(names)))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")  # as transformers 4 wrote it
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, **changes}
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def expand(base: Path, out: Path) -> None:
    expand_vocab.main(expand_vocab.ExpandVocab(str(out), str(base), str(QUANTIZER)))


@pytest.mark.parametrize(
    ("tied", "multiple", "dtype"),
    [(False, None, torch.bfloat16), (True, None, torch.float32), (False, 64, torch.float16)],
)
def test_trained_sound_tokens_are_kept_to_the_bit(tmp_path, plain, tied, multiple, dtype, capsys):
    base = plain
    if tied:
        tokenizer = AutoTokenizer.from_pretrained(plain)
        base = checkpoint(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    count = TEXT + CODES + 3
    rows = -(-count // multiple) * multiple if multiple else count
    old = publish(base, tmp_path / "ichigo", DELIMITERS + SOUNDS, rows, dtype)
    expand(old, tmp_path / "out")
    said = capsys.readouterr().out
    assert "they and their rows are kept" in said and f"model.vocab_size={rows}" in said
    before, after = (load_file(f / "model.safetensors") for f in (old, tmp_path / "out"))
    assert before.keys() == after.keys() and len(before[MATRICES[0]]) == rows
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == dtype and torch.equal(weight, after[name]), name
    identity = Quantizer.load(QUANTIZER).identity
    vocabulary = Vocabulary.load(tmp_path / "out")
    assert read_config(tmp_path / "out")["speechfuse"] == {
        "start": TEXT,
        "end": TEXT + 1,
        "first": TEXT + 2,
        "codes": CODES,
        "quantizer": identity,
    }
    assert vocabulary.sound([0, CODES]) == [TEXT, TEXT + 2, TEXT + 2 + CODES, TEXT + 1]
    assert len(vocabulary.tokenizer) == count
    for text in ("say <|sound_0003|> please", "<|sound_start|>"):
        assert vocabulary.tokenizer.decode(vocabulary.text(text)) == text
        assert max(vocabulary.text(text)) < 256, "names in a text are text, as for tokens of ours"
    manifest = artifact.manifest_of(tmp_path / "out")
    assert manifest["inputs"]["sound tokens"] == "of the base"
    card = cards.card(tmp_path / "out", ROOT / "data_cards", "me/ichigo")
    assert f"`<|sound_start|>` is id {TEXT}," in card and identity in card
    expand(old, tmp_path / "out")
    assert "complete, nothing to do" in capsys.readouterr().out


def test_a_kept_checkpoint_trains_in_stage_2_and_answers(tmp_path, capsys):
    parts = make_parts(tmp_path)
    names = DELIMITERS + SOUNDS[:17]
    old = publish(tmp_path / "init", tmp_path / "ichigo", names)
    kept = tmp_path / "kept"
    work = artifact.Artifact(kept, "expand_vocab", 2, {}, {})
    work.begin()
    expansion.expand(old, kept, 16, STREAM["quantizer"], 0, INITIALIZE)
    work.finish({}, [kept / "config.json"])
    loop.run(job(recipe(parts, tmp_path / "run", checkpoint=str(kept), steps=6, new_rows_first=2)))
    assert len(losses(tmp_path / "run")) == 6
    epoch = tmp_path / "run/epoch_0"
    assert read_config(epoch)["speechfuse"] == read_config(kept)["speechfuse"]
    before, after = (load_file(f / "model.safetensors")[MATRICES[0]] for f in (kept, epoch))
    assert before.shape == after.shape and not torch.equal(before[309:], after[309:])
    os.truncate(kept / "model.safetensors", 9000)
    with pytest.raises(ValueError, match="is it cut short"):
        loop.run(job(recipe(parts, tmp_path / "next", checkpoint=str(kept), steps=6)))
    assert not (tmp_path / "next").exists()
    loop.run(job(recipe(parts, tmp_path / "run", checkpoint=str(kept), steps=6, new_rows_first=2)))
    assert "complete, nothing to do" in capsys.readouterr().out


def test_a_kept_checkpoint_is_asked(tmp_path, plain, capsys):
    wav = tmp_path / "q.wav"
    soundfile.write(wav, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    old = publish(plain, tmp_path / "ichigo", DELIMITERS + SOUNDS)
    question = ask.Ask(str(wav), "", str(QUANTIZER), checkpoint=str(old), max_new_tokens=2)
    with pytest.raises(ValueError, match="records no sound tokens: run `just expand` on it"):
        ask.main(question)
    expand(old, tmp_path / "out")
    question.checkpoint = str(tmp_path / "out")
    ask.main(question)
    assert "answer:" in capsys.readouterr().out


WIDE = [f"<|sound_{code:05d}|>" for code in range(CODES + 1)]
SWAPPED = [*SOUNDS[:5], SOUNDS[6], SOUNDS[5], *SOUNDS[7:]]
TWICE = [*DELIMITERS, *SOUNDS, "<|sound_7|>"]
REFUSED = {
    "a code": (
        DELIMITERS + SOUNDS[:9] + SOUNDS[10:],
        r"514 sound .*: <\|sound_0009\|> missing; name",
    ),
    "some": (DELIMITERS + SOUNDS[:40], r"42 sound .*: <\|sound_0040\|>, .* and 470 more missing"),
    "the mask code": (DELIMITERS + SOUNDS[:-1], r": <\|sound_0512\|> missing"),
    "delimiters": (SOUNDS, r": <\|sound_start\|>, <\|sound_end\|> missing; name"),
    "delimiters alone": (DELIMITERS, r"has 2 sound tokens; .* and 510 more missing"),
    "codes": ([*DELIMITERS, *SOUNDS, "<|sound_0513|>"], r": <\|sound_0513\|> among or behind"),
    "another width": (
        DELIMITERS + WIDE,
        r": <\|sound_0000\|>, .*missing; <\|sound_00000\|>, .*behind",
    ),
    "two names": (TWICE, r": <\|sound_7\|> among or behind"),
    "order": (DELIMITERS + SWAPPED, r"in this order, .*: <\|sound_start\|> is the first"),
    "delimiters last": (SOUNDS + DELIMITERS, r": <\|sound_0000\|> is the first"),
    "a gap": (
        ["<|sound_start|>", "<|x|>", "<|sound_end|>", *SOUNDS],
        r": <\|x\|> among or behind them",
    ),
    "behind": (
        [*DELIMITERS, *SOUNDS, "<|duration_02|>"],
        r": <\|duration_02\|> among or behind them; name",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_partial_sound_tokens_are_refused_with_what_is_wrong(what, tmp_path, plain):
    names, says = REFUSED[what]
    base = publish(plain, tmp_path / "base", names)
    with pytest.raises(ValueError, match=says) as caught:
        expand(base, tmp_path / "out")
    assert str(base) in str(caught.value) and not (tmp_path / "out").exists()


def test_an_embedding_that_does_not_fit_the_tokenizer_is_refused(tmp_path, plain):
    """As when the tokenizer was taken from the original Llama: its 515 rows more are trained."""
    base = publish(plain, tmp_path / "more", DELIMITERS + SOUNDS)
    AutoTokenizer.from_pretrained(plain).save_pretrained(base)
    with pytest.raises(ValueError, match=rf"has {TEXT + 515} rows, but the tokenizer has {TEXT} "):
        expand(base, tmp_path / "out")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "less")
    base = publish(plain, tmp_path / "less", DELIMITERS + SOUNDS, rows=TEXT)
    with pytest.raises(ValueError, match=rf"has {TEXT} rows, but .* {TEXT + 515} tokens"):
        expand(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_padding_of_a_plain_base_becomes_sound_tokens(tmp_path, plain):
    base = publish(plain, tmp_path / "padded", [], rows=-(-TEXT // 64) * 64)
    expand(base, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    for name in MATRICES:
        assert len(after[name]) == TEXT + CODES + 3
        assert torch.equal(after[name][:TEXT], before[name][:TEXT])


def test_a_base_without_llama_3s_tokens_or_with_ours_is_refused_at_expand(tmp_path, plain):
    base = publish(plain, tmp_path / "chatml", ["<|im_start|>", "<|im_end|>"])
    text = (base / "tokenizer.json").read_text()
    for name in ("<|eot_id|>", "<|start_header_id|>"):
        text = text.replace(name, name.replace("|", ""))
    (base / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"{base}: sound tokens are added beside Llama 3's"):
        expand(base, tmp_path / "out")
    expand(plain, tmp_path / "ours")
    with pytest.raises(ValueError, match="already has sound tokens, of quantizer"):
        expand(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"start": TEXT}, "not whole"),
        ("yes", "speechfuse=yes is not whole"),
        (dict(start=TEXT, end=1, first=TEXT + 2, codes=999, quantizer="a"), "does not fit"),
    ],
)
def test_a_record_that_is_not_whole_is_refused(block, says, tmp_path, plain):
    base = publish(plain, tmp_path / "base", DELIMITERS + SOUNDS, speechfuse=block)
    with pytest.raises(ValueError, match=re.escape(f"{base}/config.json: ") + f".*{says}"):
        Vocabulary.load(base)


def test_weights_of_two_dtypes_lose_nothing(tmp_path, plain):
    base = publish(plain, tmp_path / "mixed", DELIMITERS + SOUNDS, dtype=torch.bfloat16)
    mixed = load_file(base / "model.safetensors")
    exact = mixed[MATRICES[0]].float() + 1e-5
    save_file(mixed | {MATRICES[0]: exact}, base / "model.safetensors", {"format": "pt"})
    expand(base, tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after[MATRICES[0]], exact)
    assert all(torch.equal(after[name], mixed[name].float()) for name in mixed.keys() - {*MATRICES})
