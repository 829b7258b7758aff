"""Golden codes of WhisperVQ, and what it decodes of codes, made by the genuine whisperspeech 0.8.9.

In: nothing; all weights and clips are random. Out, beside this file:
    whisper.pt                an openai-whisper checkpoint, in fp16 as the published ones
    whispervq.model           a WhisperVQ, tensors named as in the published en+pl and v3-7lang
    whispervq-fixed.model     the same, tensors named as in their "-fixed" copies
    whisperspeech_codes.json  for each clip of `clips()`: checksum of the waveform, codes
    whisper-decoding.pt       another Whisper, with the published .en vocabulary
    whispervq-decoding.model  another WhisperVQ, with all settings of the published ones
    whispervq-oldest.model    the same without the settings that came later: rope, mask_embs, ...
    whisperspeech_decoding.json  for each of the two: codes, the features and text decoded of them
The genuine package reads the models back, and all results come from what it read. Tensors that
only decoding uses have their true shape in the first models but are one zero repeated (stride 0),
which takes no room; large tables of the others are rows of one vector, each a place further on.

whisperspeech cannot share an environment with the project's torch. To make its own (about 7 GB),
and to run:
    python3.11 -m venv oracle
    oracle/bin/pip install torch==2.8.0 torchaudio==2.8.0 whisperspeech==0.8.9 \
        openai-whisper==20250625 vector-quantize-pytorch==1.6.22 fastcore==2.2.39 \
        webdataset==1.0.2 matplotlib==3.11.2 ipython==9.18.1 pandas==3.1.1
    OMP_NUM_THREADS=1 oracle/bin/python tests/golden/make_whisperspeech_golden.py
"""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
SEED = 17
SECONDS = (0.5, 1.0, 1.7, 2.99, 3.01, 5.0, 8.3, 12.0, 20.0, 29.98, 30.0)
SAMPLE_RATE = 16_000
TOKEN_RATE = 25
CODES = 512
DECODING_CODES = 32
GAIN = 1.25
# Least distance in cosine between the best and the second-best code of any token. Cosines move by
# about 1e-6 from one set of CPU kernels to another: codes must not depend on the machine.
MARGIN = 1e-4
STORED = (
    "codebook_dim,vq_codes,q_depth,n_head,head_width,ffn_mult,depth,use_cosine_sim,downsample,"
    "whisper_model_name"
)  # what store_attr keeps in the published files' config
NOT_ENCODING = (
    "_out_blocks.",
    "positional_embedding.",
    "ln_post.",
    "rq.layers.0.project_out.",
    "rq.layers.0._codebook.embed_avg",
    "rq.layers.0._codebook.cluster_size",
)


def clips() -> dict[str, np.ndarray]:
    """Duration in seconds -> float32 waveform at 16 kHz: random syllables of gliding harmonics and
    noise, pauses of digital silence; some clips are loud, some faint.

    The same samples on every machine: numpy never changes RandomState's uniform stream, and
    rounding to 16 bits hides the last bits of the platform's sine.
    """
    waveforms = {}
    for seed, seconds in enumerate(SECONDS):
        random = np.random.RandomState(seed)
        total, signal = round(seconds * SAMPLE_RATE), np.empty(0)
        level = 8000 * 0.01 ** random.random_sample()
        while len(signal) < total:
            pitch, glide, loudness, breath, length = random.random_sample(5)
            t = np.arange(int((0.08 + 0.25 * length) * SAMPLE_RATE)) / SAMPLE_RATE
            phase = 2 * np.pi * (80 + 300 * pitch) * (t + (glide - 0.5) * t * t)
            voice = sum(np.sin(k * phase) / k for k in (1, 2, 3, 5, 8))
            noise = 2 * random.random_sample(len(t)) - 1
            syllable = (loudness > 0.2) * loudness * ((1 - breath) * voice + breath * noise)
            signal = np.append(signal, syllable)
        waveforms[str(seconds)] = (np.round(level * signal[:total]) / 32768).astype(np.float32)
    return waveforms


def checksum(waveform: np.ndarray) -> str:
    """sha256 of the little-endian float32 samples."""
    return hashlib.sha256(waveform.astype("<f4").tobytes()).hexdigest()


def hollow(tensor: Tensor) -> Tensor:
    """Zeros of the same shape and dtype in the room of one."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Weights about as large as trained ones: untrained biases, norms and MLPs are so near to
    nothing that a reader could leave them out unnoticed."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        else:
            parameter.normal_(std=GAIN / parameter[0].numel() ** 0.5)


def make_whisper(path: Path) -> nn.Module:
    """Write a random Whisper, return it as openai-whisper reads it."""
    import whisper

    dims = whisper.model.ModelDimensions(
        n_mels=80,
        n_audio_ctx=1500,
        n_audio_state=128,
        n_audio_head=2,
        n_audio_layer=2,
        n_vocab=64,
        n_text_ctx=8,
        n_text_state=128,
        n_text_head=2,
        n_text_layer=1,
    )
    model = whisper.model.Whisper(dims)
    randomize(model.encoder)
    state = {
        key: hollow(tensor) if key.startswith("decoder.") else tensor
        for key, tensor in model.half().state_dict().items()
    }
    torch.save({"dims": asdict(dims), "model_state_dict": state}, path)
    return whisper.load_model(str(path), device="cpu").eval()


def encode(model: Any, waveform: np.ndarray) -> tuple[np.ndarray, Tensor, float]:
    """Codes of one clip by the genuine package, the vectors it quantized, and the least margin."""
    seen: list[Tensor] = []
    layer = model.rq.layers[0]
    hook = layer.project_in.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.inference_mode():
        codes = model.encode_audio(torch.from_numpy(waveform)[None])[0]
    hook.remove()
    projected = seen[0][: len(codes)]
    cosines = nn.functional.normalize(projected, dim=-1) @ layer._codebook.embed[0].T
    best, second = cosines.topk(2).values.T
    return codes.numpy(), projected, float((best - second).min())


def make_quantizer(path: Path, teacher: nn.Module, waveforms: list[np.ndarray]) -> Any:
    """Write a WhisperVQ whose codebook is made of what it hears in the clips, as a trained one is;
    return it as whisperspeech reads it."""
    from whisperspeech.vq_stoks import RQBottleneckTransformer, Tunables

    model = RQBottleneckTransformer(
        vq_codes=CODES,
        q_depth=1,
        depth=1,
        n_head=2,
        head_width=64,
        codebook_dim=64,
        threshold_ema_dead_code=0,
        use_cosine_sim=True,
        downsample=2,
        whisper_model_name="medium",
        tunables=Tunables(mask_embs=True, downsample_mean=True),
    ).eval()
    model.whmodel = [teacher]
    randomize(nn.ModuleList([model.mlp, model.mlp_ln]))
    layer = model.rq.layers[0]
    heard = torch.cat([encode(model, waveform)[1] for waveform in waveforms])
    with torch.no_grad():
        layer.project_in.bias -= heard.mean(0)
        rows = (heard - heard.mean(0))[torch.randperm(len(heard))[: CODES + 1]]
        layer._codebook.embed[0] = nn.functional.normalize(rows, dim=-1)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.startswith(NOT_ENCODING):
                tensor.data = hollow(tensor)
    # fastcore 2 no longer leaves this attribute, which save_model writes as the config
    model.__stored_args__ = {name: getattr(model, name) for name in STORED.split(",")}
    model.save_model(path)
    model = RQBottleneckTransformer.load_model(str(path))
    model.whmodel = [teacher]
    return model


def rename_as_fixed(path: Path, fixed: Path) -> None:
    """What the publishers of the "-fixed" files did, for newer vector-quantize-pytorch."""
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {
        key.replace("rq.layers.0.project_", "rq.project_"): tensor
        for key, tensor in content["state_dict"].items()
    }
    torch.save(content, fixed)


def slanted(rows: int, width: int, std: float, dtype: torch.dtype) -> Tensor:
    """A random (rows, width) table in the room of one vector: row i is its numbers from i on."""
    vector = torch.randn(rows + width).mul(std).to(dtype)
    return vector.as_strided((rows, width), (1, 1))


def make_decoding_whisper(path: Path) -> nn.Module:
    """Write a random Whisper that can decode text, return it as openai-whisper reads it."""
    import whisper

    dims = whisper.model.ModelDimensions(
        n_mels=80,
        n_audio_ctx=1500,
        n_audio_state=32,
        n_audio_head=2,
        n_audio_layer=1,
        n_vocab=51_864,
        n_text_ctx=16,
        n_text_state=32,
        n_text_head=2,
        n_text_layer=1,
    )
    model = whisper.model.Whisper(dims)
    model.decoder.positional_embedding.data.normal_()
    randomize(model)
    for part in (model.decoder.blocks[0].cross_attn.key, model.decoder.blocks[0].cross_attn.out):
        part.weight.data *= 3  # so that the text depends more on what is heard than on itself
    state = model.half().state_dict()
    state["decoder.token_embedding.weight"] = slanted(dims.n_vocab, 32, 0.2, torch.float16)
    torch.save({"dims": asdict(dims), "model_state_dict": state}, path)
    return whisper.load_model(str(path), device="cpu").eval()


def make_decoding_quantizer(path: Path, teacher: nn.Module, tunables: dict) -> Any:
    """Write a small random WhisperVQ whose decoding half is real, return it as read back."""
    from whisperspeech.vq_stoks import RQBottleneckTransformer, Tunables

    model = RQBottleneckTransformer(
        vq_codes=DECODING_CODES,
        q_depth=1,
        depth=2,
        n_head=2,
        head_width=16,
        codebook_dim=8,
        use_cosine_sim=True,
        downsample=2,
        whisper_model_name="tiny.en",
        tunables=Tunables(**Tunables.upgrade(tunables)),
    ).eval()
    randomize(model)
    embedding = model.rq.layers[0]._codebook.embed
    embedding.copy_(nn.functional.normalize(torch.randn_like(embedding), dim=-1))
    state = model.state_dict()
    state["positional_embedding.weight"] = slanted(1500, 32, 0.5, torch.float32)
    config = {name: getattr(model, name) for name in STORED.split(",")}
    torch.save({"config": config, "tunables": tunables, "state_dict": state}, path)
    model = RQBottleneckTransformer.load_model(str(path))
    model.whmodel = [teacher]
    return model


def decode(model: Any, teacher: nn.Module, codes: Tensor) -> dict[str, Any]:
    """Features at some places and the text of one clip's codes, by the genuine packages."""
    import whisper

    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    with torch.inference_mode():
        features = model.dequantize(codes)
        model.ensure_whisper()
        text = model.decode_text(codes, options)[0].text
        for _ in range(8):  # the text must not depend on the last bits of the machine's arithmetic
            near = features + torch.randn_like(features) * MARGIN
            if teacher.decode(near, options)[0].text != text:
                raise SystemExit("a near-tie in the text; try another SEED")
    places = [0, 1, *torch.randint(2, 1498, (4,)).tolist(), 1499]
    kept = {str(at): [round(v, 5) for v in features[0, at].tolist()] for at in places}
    return {"codes": codes.tolist(), "text": text, "features": kept}


def make_decoding_golden() -> None:
    torch.manual_seed(SEED)
    teacher = make_decoding_whisper(HERE / "whisper-decoding.pt")
    newest = {"rope": True, "mask_embs": True, "downsample_mean": True, "query_mult": 2}
    results = {}
    for name, tunables in (("decoding", newest), ("oldest", {})):
        model = make_decoding_quantizer(HERE / f"whispervq-{name}.model", teacher, tunables)
        clips = [torch.randint(0, DECODING_CODES, (length,)) for length in (0, 1, 40, 377, 750)]
        results[name] = [decode(model, teacher, codes) for codes in clips]
    texts = {clip["text"] for clips in results.values() for clip in clips}
    rows = [
        f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(clip)}" for clip in clips) + "\n  ]"
        for name, clips in results.items()
    ]
    (HERE / "whisperspeech_decoding.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{len(texts)} different texts: {sorted(texts)}")


def main() -> None:
    make_decoding_golden()
    torch.manual_seed(SEED)
    waveforms = clips()
    teacher = make_whisper(HERE / "whisper.pt")
    model = make_quantizer(HERE / "whispervq.model", teacher, list(waveforms.values()))
    rename_as_fixed(HERE / "whispervq.model", HERE / "whispervq-fixed.model")

    results = {name: encode(model, waveform) for name, waveform in waveforms.items()}
    margin = min(result[2] for result in results.values())
    used = set(np.concatenate([codes for codes, _, _ in results.values()]).tolist())
    if margin < MARGIN or CODES not in used:
        raise SystemExit(f"margin {margin:.1e}, mask code used: {CODES in used}; try another SEED")
    packages = ("whisperspeech", "openai-whisper", "vector-quantize-pytorch", "torch", "numpy")
    head = {"made_with": {name: version(name) for name in packages}, "seed": SEED, "margin": margin}
    rows = [  # one line a clip
        f'  "{name}": {{"sha256": "{checksum(wave)}", "codes": {results[name][0].tolist()}}}'
        for name, wave in waveforms.items()
    ]
    body = json.dumps(head, indent=1)[:-2] + ',\n "clips": {\n' + ",\n".join(rows) + "\n }\n}\n"
    (HERE / "whisperspeech_codes.json").write_text(body)
    print(f"{len(rows)} clips, {len(used)} different codes, margin {margin:.1e}")


if __name__ == "__main__":
    main()
