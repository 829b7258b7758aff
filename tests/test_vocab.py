"""Sound tokens: contiguous ids in the original's order, old rows untouched, two quantizers never
mixed."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from speechfuse import artifact
from speechfuse.evals.generation import Generator
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import shards
from speechfuse.samples import datasets, packing
from speechfuse.tokens import expansion, initialization
from speechfuse.tokens.vocabulary import SoundLayout, Vocabulary, read_config
from stages import expand_vocab
from tests.demo_code import demo

init_base = demo("init_base")

ROOT = Path(__file__).parent.parent
CODES = 16
OURS, OTHER = "a1" * 32, "f" * 64
TEXT = 256 + len(init_base.CONTROL)  # tokens before the sound tokens


def checkpoint(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes) -> Path:
    torch.manual_seed(0)
    shape = LlamaConfig(
        **{"hidden_size": 8, **changes},
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


INITIALIZE = {"_component_": "speechfuse.tokens.mean_and_covariance"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    tokenizer = init_base.train_tokenizer(["one two three"], vocab_size=256)
    return checkpoint(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def expanded(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("expanded")
    expansion.expand(base, out, CODES, OURS, 0, INITIALIZE)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_ids_are_start_end_codes_and_mask_behind_the_text(base, expanded):
    tokenizer = AutoTokenizer.from_pretrained(expanded)
    names = ["<|sound_start|>", "<|sound_end|>", *(f"<|sound_{i:04d}|>" for i in range(CODES + 1))]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(TEXT, TEXT + CODES + 3))
    assert len(tokenizer) == TEXT + CODES + 3
    old = AutoTokenizer.from_pretrained(base)
    assert old.convert_ids_to_tokens(range(TEXT)) == tokenizer.convert_ids_to_tokens(range(TEXT))
    vocabulary = Vocabulary.load(expanded)
    assert vocabulary.sound([0, 3, CODES]) == [TEXT, TEXT + 2, TEXT + 5, TEXT + 2 + CODES, TEXT + 1]
    assert vocabulary.sound([]) == [TEXT, TEXT + 1]


def test_layout_and_quantizer_stand_in_config_json(expanded):
    config = json.loads((expanded / "config.json").read_text())
    assert config["speechfuse"] == {
        "start": TEXT,
        "end": TEXT + 1,
        "first": TEXT + 2,
        "codes": CODES,
        "quantizer": OURS,
    }
    assert config["vocab_size"] == TEXT + CODES + 3
    assert Vocabulary.load(expanded).layout == SoundLayout(TEXT, TEXT + 1, TEXT + 2, CODES, OURS)


def test_old_rows_and_all_other_weights_are_unchanged_and_new_rows_are_alive(base, expanded):
    old, new = weights(base), weights(expanded)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor), name
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert len(new[name]) == len(tensor) + grown * (CODES + 3)
        if grown:
            added = new[name][TEXT:]
            assert added.isfinite().all() and added.abs().max() < 3 * tensor.abs().max()
            assert (added.mean(0) - tensor.mean(0)).abs().max() < 0.1 * tensor.std()


def test_new_rows_depend_on_the_seed_alone(base, expanded, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        torch.manual_seed(99)
        expansion.expand(base, tmp_path / name, CODES, OURS, seed, INITIALIZE)
    name = "model.embed_tokens.weight"
    first, same, other = (
        weights(f)[name] for f in (expanded, tmp_path / "same", tmp_path / "other")
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_tied_embeddings_and_the_dtype_survive(tmp_path):
    tokenizer = init_base.train_tokenizer(["one two"], vocab_size=256)
    folder = checkpoint(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    expansion.expand(folder, tmp_path / "out", CODES, OURS, 0, INITIALIZE)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert new.dtype == torch.bfloat16
    assert (
        new.get_input_embeddings().weight.data_ptr()
        == new.get_output_embeddings().weight.data_ptr()
    )
    assert torch.equal(new.state_dict()["lm_head.weight"][:TEXT], weights(folder)["lm_head.weight"])


def test_a_name_in_the_tokenizer_is_its_id_and_back(expanded):
    tokenizer = AutoTokenizer.from_pretrained(expanded)
    id = TEXT + 2 + 3
    assert tokenizer.encode("<|sound_0003|>", add_special_tokens=False) == [id]
    assert tokenizer.decode([id]) == "<|sound_0003|>"
    ids = Vocabulary.load(expanded).sound([3, 12])
    written = "<|sound_start|><|sound_0003|><|sound_0012|><|sound_end|>"
    assert tokenizer.decode(ids) == written
    assert tokenizer.encode(written, add_special_tokens=False) == ids


@pytest.mark.parametrize(
    "token", ["<|sound_0003|>", "<|sound_start|>", "<|eot_id|>", "<|begin_of_text|>"]
)
def test_token_names_inside_plain_text_are_text(expanded, token):
    vocabulary = Vocabulary.load(expanded)
    ids = vocabulary.text(f"say {token} please")
    assert max(ids) < 256
    assert vocabulary.tokenizer.decode(ids) == f"say {token} please"


def test_codes_out_of_range_and_unexpanded_checkpoints_are_refused(base, expanded):
    with pytest.raises(ValueError, match=f"code {CODES + 1} is out of range.*0-{CODES}"):
        Vocabulary.load(expanded).sound([0, CODES + 1])
    with pytest.raises(ValueError, match="no sound tokens: run `just expand`"):
        Vocabulary.load(base).sound([0])


def test_expanding_twice_is_refused(expanded, tmp_path):
    with pytest.raises(ValueError, match="already has sound tokens"):
        expansion.expand(expanded, tmp_path / "twice", CODES, OURS, 0, INITIALIZE)
    assert not (tmp_path / "twice").exists()


def test_a_tokenizer_without_llama_3s_tokens_is_refused(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), unk_token="?"
    )
    with pytest.raises(ValueError, match="no control tokens of Llama 3 and no chat template"):
        Vocabulary.load(checkpoint(tmp_path, tokenizer))
    tokenizer.add_special_tokens({"eos_token": "!"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '!' }}{% endfor %}"
    with pytest.raises(ValueError, match="added beside Llama 3's control tokens alone"):
        expansion.has_sound_tokens(tmp_path, tokenizer, CODES)
    tokenizer.add_tokens("<|start_header_id|>")
    with pytest.raises(ValueError, match=r"no <\|begin_of_text\|>"):
        Vocabulary.load(checkpoint(tmp_path / "half", tokenizer))
    with pytest.raises(FileNotFoundError, match=r"no Hugging Face checkpoint at .*absent"):
        Vocabulary.load(tmp_path / "absent")


def llama_3_1_tokenizer() -> PreTrainedTokenizerFast:
    """128,000 text tokens and 256 control tokens with the ids of Llama 3.1; the text tokens are
    fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"filler{i:06d}" for i in range(128_000 - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    known = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    tokenizer.add_special_tokens([known.get(i) or next(reserved) for i in range(256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_llama_3_1_with_512_codes_has_the_ids_of_the_original(tmp_path):
    tokenizer = llama_3_1_tokenizer()
    assert len(tokenizer) == 128_256
    assert tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"]) == [
        128_000,
        128_009,
    ]
    base = checkpoint(tmp_path / "base", tokenizer)
    layout = expansion.expand(base, tmp_path / "out", 512, OURS, 0, INITIALIZE)
    assert layout == SoundLayout(
        start=128_256, end=128_257, first=128_258, codes=512, quantizer=OURS
    )
    vocabulary = Vocabulary.load(tmp_path / "out")
    assert vocabulary.sound([0, 511, 512]) == [128_256, 128_258, 128_769, 128_770, 128_257]
    assert len(vocabulary.tokenizer) == 128_771
    assert read_config(tmp_path / "out")["vocab_size"] == 128_771
    assert weights(tmp_path / "out")["lm_head.weight"].shape == (128_771, 8)


def dataset(folder: Path, quantizer: str) -> Path:
    work = artifact.Artifact(folder, "test", 1, {}, {})
    work.begin()
    stream = {"quantizer": quantizer, "token_rate": 25.0, "codebooks": 1, "codebook_size": CODES}
    path = folder / shards.shard_name(0)
    shards.write_shard(path, [{"id": "a", "codes": [1, 2], "extra": "{}"}], shards.SPEECH, stream)
    work.finish({}, [path])
    return folder


def test_speech_of_another_quantizer_is_refused_by_training(base, expanded, tmp_path):
    def load(folder: Path, checkpoint: Path):
        spec = {"_component_": "speechfuse.samples.sound", "path": str(folder), "share": 1.0}
        shape = packing.Shape(seq_len=16, rows=1, packed=True)
        return datasets.load([spec], checkpoint, shape, 1, None, 0, tmp_path / "cache")

    other = dataset(tmp_path / "other", OTHER)
    with pytest.raises(ValueError) as caught:
        load(other, expanded)
    message = str(caught.value)
    assert f"{other} was made with quantizer {OTHER[:12]}" in message
    assert f"expanded for {OURS[:12]}" in message and "tokenize again" in message
    ours = dataset(tmp_path / "ours", OURS)
    with pytest.raises(ValueError, match="no sound tokens: run `just expand`"):
        load(ours, base)
    mixture = load(ours, expanded)
    tokens = mixture.samples(0)[0][0].tokens.tolist()
    assert tokens == [256, TEXT, TEXT + 3, TEXT + 4, TEXT + 1, 257]


def test_speech_of_another_quantizer_is_refused_by_the_listener(base, expanded):
    with pytest.raises(
        ValueError, match=f"q.wav was made with quantizer {OTHER[:12]}, but .*{OURS[:12]}"
    ):
        Generator(expanded, OTHER, "q.wav")
    with pytest.raises(ValueError, match="no sound tokens: run `just expand`"):
        Generator(base, OURS, "q.wav")
    listener = Generator(expanded, OURS, "q.wav")
    turns = [{"role": "user", "segments": [{"speech": {"codes": [1, 2]}}]}]
    assert len(listener.reply([turns, turns[:]], max_new_tokens=2)) == 2


def test_the_job_records_the_layout_of_the_quantizer_it_is_given(base, tmp_path):
    quantizer = ROOT / "recipes/demo/models/quantizer"
    job = expand_vocab.ExpandVocab(
        out=str(tmp_path / "out"), base=str(base), quantizer=str(quantizer)
    )
    expand_vocab.main(job)
    identity, codes = (lambda q: (q.identity, q.codebook_size))(Quantizer.load(quantizer))
    assert Vocabulary.load(tmp_path / "out").layout == SoundLayout(
        TEXT, TEXT + 1, TEXT + 2, codes, identity
    )
    manifest = artifact.manifest_of(tmp_path / "out")
    assert manifest["inputs"]["quantizer"] == manifest["totals"]["quantizer"] == identity
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest["outputs"].keys()
    assert not [name for name in manifest["outputs"] if name.startswith(".")]  # its lock is gone


def test_the_identity_is_that_of_the_quantizer_cut_to_its_window(base, tmp_path):
    golden = ROOT / "tests/golden"
    codec, whisper = golden / "whispervq-decoding.model", golden / "whisper-decoding.pt"
    out = tmp_path / "out"
    expand_vocab.main(
        expand_vocab.ExpandVocab(str(out), str(base), str(codec), str(whisper), window=2.0)
    )
    assert Vocabulary.load(out).layout.quantizer == Quantizer.load(codec, whisper, 2.0).identity


def given(rows: torch.Tensor, seed: int = 0, **changes) -> initialization.NewRowContext:
    """For 512 codes, on a codebook of 16 dimensions."""
    chance = torch.Generator().manual_seed(7)
    vectors = torch.nn.functional.normalize(torch.randn(512, 16, generator=chance))
    values = {"codes": 512, "codebook": vectors, "std": 0.02} | changes
    return initialization.NewRowContext(rows, **values, rng=torch.Generator().manual_seed(seed))


def made(name: str, what: initialization.NewRowContext, **arguments) -> torch.Tensor:
    return initialization.new_rows({"_component_": f"speechfuse.tokens.{name}", **arguments}, what)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """More than a block; their mean is not 0, their columns are unequal and not independent."""
    chance = torch.Generator().manual_seed(3)
    mixed = torch.randn(24, 24, generator=chance) * torch.linspace(0.1, 2, 24)
    rows = torch.randn(20_000, 24, generator=chance) @ mixed
    return rows + torch.linspace(-3, 3, 24)


def test_each_choice_of_new_rows_is_spread_as_it_says(rows):
    spread = (rows - rows.mean(0)).norm(dim=1).mean()
    drawn = made("normal", given(rows))
    assert drawn.shape == (515, 24) and drawn.mean().abs() < 1e-3
    assert drawn.std() == pytest.approx(0.02, rel=0.05)
    same = made("mean", given(rows))
    torch.testing.assert_close(same, rows.mean(0).repeat(515, 1))
    theirs = made("mean_and_covariance", given(rows))
    apart = (theirs - rows.mean(0)).norm(dim=1)
    assert apart.mean() / spread == pytest.approx(1e-9**0.5, rel=0.1)
    assert len(theirs.unique(dim=0)) == 515
    wide = made("mean_and_covariance", given(rows), scale=1.0)
    for found in (wide, made("codebook", given(rows))):
        off = found[2:-1].mean(0) - rows.mean(0)
        assert off.norm() < 0.15 * spread
        apart = (found - found.mean(0)).norm(dim=1)
        assert apart.mean() / spread == pytest.approx(1, rel=0.25)
        assert (apart > 0.1 * spread).all(), "sound_start, sound_end and the mask code too"
    error = (wide.T.cov() - rows.T.cov()).norm() / rows.T.cov().norm()
    assert error < 0.2, "of the old rows' covariance, and not of its diagonal"


def test_codes_that_are_near_in_the_codebook_begin_near():
    what = given(torch.randn(2000, 160, generator=torch.Generator().manual_seed(1)))
    pairs = torch.pdist(what.codebook)
    for name, least, most in (("codebook", 0.7, 1), ("mean_and_covariance", -0.05, 0.05)):
        apart = torch.pdist(made(name, what, **({} if least > 0 else {"scale": 1.0}))[2:-1])
        alike = float(torch.stack([pairs, apart]).corrcoef()[0, 1])
        assert least < alike < most, name


def test_new_rows_of_bfloat16_are_drawn_in_float32(rows):
    half = made("mean_and_covariance", given(rows.bfloat16()))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, made("mean_and_covariance", given(rows)), atol=1e-2, rtol=0)


def test_new_rows_are_the_same_with_any_number_of_threads(rows):
    """Covariances are matrix products; their last bits decided over every later number."""
    try:
        for name in ("normal", "mean", "mean_and_covariance", "codebook"):
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(made(name, given(rows)))
                assert torch.get_num_threads() == threads
            assert torch.equal(*found), name
            if name != "mean":
                assert not torch.equal(found[0], made(name, given(rows, seed=1)))
    finally:
        torch.set_num_threads(1)


def test_new_rows_that_cannot_be_made_are_refused(rows):
    with pytest.raises(ValueError, match=r"initialize.scale=0: .* choose mean"):
        made("mean_and_covariance", given(rows), scale=0)
    with pytest.raises(ValueError, match="needs the vectors of the quantizer's codebook"):
        made("codebook", given(rows, codebook=None))
    with pytest.raises(ValueError, match=r"all vectors .* are equal: it is not trained"):
        made("codebook", given(rows, codebook=torch.ones(512, 16)))
    with pytest.raises(ValueError, match="did you mean 'normal'"):
        made("normall", given(rows))


@pytest.mark.parametrize("tied", [False, True])
def test_the_job_makes_the_rows_it_is_asked_for_and_records_it(tmp_path, tied):
    tokenizer = init_base.train_tokenizer(["one two"], vocab_size=256)
    base = checkpoint(tmp_path / "base", tokenizer, tie_word_embeddings=tied, hidden_size=32)
    quantizer = ROOT / "recipes/demo/models/quantizer"
    near = torch.pdist(Quantizer.load(quantizer).codebook[:512])
    found = {}
    for name in ("codebook", "mean"):
        job = expand_vocab.ExpandVocab(
            out=str(tmp_path / name),
            base=str(base),
            quantizer=str(quantizer),
            initialize={"_component_": f"speechfuse.tokens.{name}"},
        )
        expand_vocab.main(job)
        config = artifact.manifest_of(tmp_path / name)["config"]
        assert config["initialize"] == {"_component_": f"speechfuse.tokens.{name}"}
        both = weights(tmp_path / name)
        found[name] = [both[key][TEXT:] for key in ("model.embed_tokens.weight", "lm_head.weight")]
    for matrix in found["codebook"]:
        assert torch.stack([near, torch.pdist(matrix[2:-1])]).corrcoef()[0, 1] > 0.5
    assert torch.equal(*found["codebook"]) == tied, "another projection for a head of its own"
    for matrix in found["mean"]:
        assert len(matrix.unique(dim=0)) == 1 and matrix.any()
