"""Golden values of NVIDIA NeMo's own DuplexS2S, to which ours is held (tests/test_duplex_nemo.py).

    python3 -m venv .venv-nemo && .venv-nemo/bin/pip install -r requirements-nemo.txt
    .venv-nemo/bin/python tests/golden/make_duplex_golden.py

In: the demo's base model, which is the language model with its weights. Out: duplex.json
(sessions, label tracks, codes, losses) and duplex.safetensors (the user's frames, weights,
gradients). Genuine are DuplexS2SDataset, DuplexS2SModel with its labels, sums and losses, its
perception (FastConformer, IdentityConnector, projection) and its AudioCodecModel (causal HiFi-GAN
encoder, FSQ in four groups, 12.5 frames a second); all but the language model has random weights,
the codec's without biases, so that every silent frame has the same codes. The pad token is
<|end_of_text|>, as in ours. Sound is noise.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_speechlm2_golden import BASE, CONFIG, ENCODER, HERE  # isort: skip  offline first

import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment, compute_num_frames
from nemo.collections.speechlm2.data import DuplexS2SDataset
from nemo.collections.speechlm2.models import DuplexS2SModel
from nemo.collections.tts.models import AudioCodecModel
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

FRAME, RATE, HOP = 0.08, 22_050, 1764
WIDTH, BOOKS, CODES = 32, 4, 8  # of a user's frame; of the codec
LOSSES = "nemo.collections.tts.losses.audio_codec_loss"
MODULES = "nemo.collections.tts.modules.audio_codec_modules"
SMALL = {"resblock_kernel_sizes": [1], "resblock_dilation_sizes": [1]}
NARROW = {"in_kernel_size": 1, "out_kernel_size": 1}
CODEC = {
    "sample_rate": RATE,
    "samples_per_frame": HOP,
    "loss_resolutions": [[512, 128, 512]],
    "mel_loss_dims": [16],
    "commit_loss_scale": 0.0,
    "audio_encoder": {
        "_target_": f"{MODULES}.CausalHiFiGANEncoder",
        "encoded_dim": BOOKS,
        "down_sample_rates": [7, 7, 6, 6],
        "base_channels": 2,
        **NARROW,
        **SMALL,
    },
    "vector_quantizer": {
        "_target_": f"{MODULES}.GroupFiniteScalarQuantizer",
        "num_groups": BOOKS,
        "num_levels_per_group": [CODES],
    },
    "audio_decoder": {
        "_target_": f"{MODULES}.CausalHiFiGANDecoder",
        "input_dim": BOOKS,
        "up_sample_rates": [6, 6, 7, 7],
        "base_channels": 32,
        **SMALL,
    },
    "generator_loss": {"_target_": f"{LOSSES}.GeneratorSquaredLoss"},
    "discriminator_loss": {"_target_": f"{LOSSES}.DiscriminatorSquaredLoss"},
}
Turn = tuple[str, float, float, str]  # speaker, start and end in seconds, text
ONE: list[Turn] = [("user", 0.0, 0.2, "paris"), ("agent", 0.24, 0.8, "seven")]
TWO: list[Turn] = [
    ("agent", 0.16, 0.48, "eleven"),
    ("user", 0.3, 0.5, "paris"),
    ("agent", 0.56, 1.0, "seven plus"),
]
SUM = "seven plus four is eleven"
CASES: dict[str, list[tuple[float, list[Turn]]]] = {  # seconds and turns of a batch's sessions
    "one turn": [(1.0, ONE)],
    "a batch of two": [(1.0, ONE), (1.0, TWO)],
    "times between frames": [(2.4, [("agent", 1.16, 1.96, SUM)])],
    "text that the session's end cuts": [(2.0, [("agent", 1.68, 2.0, SUM)])],
    "nothing said": [(1.0, [("user", 0.2, 0.9, SUM)])],
    # the times of NeMo's own test of its data set
    "an end mark over text": [(1.0, [("agent", 0.3, 0.4, "seven"), ("agent", 0.6, 1.0, "four")])],
}


def codec_in(folder: Path) -> str:
    """Write a random codec as NeMo saves it; return its path."""
    codec = AudioCodecModel(OmegaConf.create(CODEC))
    for name, parameter in codec.audio_encoder.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
        elif name.startswith("post_conv") and name.endswith("original0"):  # its loudness
            parameter.data.mul_(2000)
    codec.save_to(str(folder / "codec.nemo"))
    return str(folder / "codec.nemo")


def model_in(folder: Path) -> DuplexS2SModel:
    """Return the model with the demo's base as its language model."""
    shutil.copytree(BASE, folder / "base")
    path = folder / "base/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|end_of_text|>"}))
    shape = ENCODER | {"d_model": WIDTH, "subsampling_conv_channels": 16}
    connector = CONFIG["perception"]["modality_adapter"] | {"d_model": WIDTH}
    perception = CONFIG["perception"] | {"encoder": shape, "modality_adapter": connector}
    paths = {"pretrained_llm": str(folder / "base"), "pretrained_audio_codec": codec_in(folder)}
    weights = {"text_loss_weight": 3, "audio_loss_weight": BOOKS, "scoring_asr": "none"}
    frozen = {"freeze_params": ["^audio_codec\\..+$"]}
    model = DuplexS2SModel(CONFIG | {"perception": perception} | paths | weights | frozen)
    stored = load_file(BASE / "model.safetensors")
    model.lm_head.load_state_dict({"weight": stored.pop("lm_head.weight")})
    model.embed_tokens.load_state_dict({"weight": stored.pop("model.embed_tokens.weight")})
    model.llm.load_state_dict({n.removeprefix("model."): t for n, t in stored.items()})
    for name, parameter in model.named_parameters():
        parts = ("perception.proj", "embed_audio_tokens", "audio_head")
        parameter.requires_grad_(name.startswith(parts))
    model.perception.encoder.eval()
    model.log_dict = lambda *_, **__: None
    return model


def cut_of(folder: Path, name: str, seconds: float, turns: list[Turn]) -> MonoCut:
    """Return a session whose agent is heard from its turn's first frame to its last but one: the
    codec's encoder looks back a little more than a frame."""
    sound = torch.zeros(round(seconds * RATE))
    for speaker, start, end, _ in turns:
        first, last = (compute_num_frames(t, FRAME, 16_000) for t in (start, end))
        if speaker == "agent":
            part = sound[first * HOP : (last - 1) * HOP]
            part.copy_(0.5 * torch.randn(len(part)))
    recordings = []
    for side, rate, wave in (
        ("user", 16_000, 0.1 * torch.randn(round(seconds * 16_000))),
        ("agent", RATE, sound),
    ):
        path = folder / f"{name}.{side}.wav"
        soundfile.write(path, wave.numpy(), rate, "FLOAT")
        recordings.append(Recording.from_file(path))
    user, agent = recordings
    supervisions = [
        SupervisionSegment(f"{name}-{i}", user.id, start, round(end - start, 3), 0, text, None, who)
        for i, (who, start, end, text) in enumerate(turns)
    ]
    return MonoCut(name, 0, seconds, 0, supervisions, None, user, {"target_audio": agent})


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    model = model_in(folder)
    dataset = DuplexS2SDataset(model.tokenizer, FRAME, 16_000, RATE)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors = {f"weights.{name}": p.detach().clone() for name, p in trained.items()}
    facts: dict[str, Any] = {}
    for number, (name, sessions) in enumerate(CASES.items()):
        cuts = [cut_of(folder, f"{number}.{i}", *each) for i, each in enumerate(sessions)]
        batch = dataset[CutSet.from_cuts(cuts)]
        audio, lengths = batch["source_audio"], batch["source_audio_lens"]
        with torch.no_grad():
            _, counts, frames = model.perception(
                input_signal=audio, input_signal_length=lengths, return_encoder_emb=True
            )
            codes, _ = model.audio_codec.encode(
                audio=batch["target_audio"], audio_len=batch["target_audio_lens"]
            )
        inputs = model.prepare_inputs(batch)
        model.zero_grad()
        result = model.training_step(batch, 0)
        result["loss"].backward()
        tensors[f"{number}.frames"] = frames[:, : counts.max()].clone()
        if len(sessions) > 1:
            tensors |= {f"gradients.{key}": p.grad.clone() for key, p in trained.items()}
        turns = ("speaker", "start", "end", "text")
        facts[name] = {
            "sessions": [[dict(zip(turns, t, strict=True)) for t in each] for _, each in sessions],
            "seconds": [seconds for seconds, _ in sessions],
            "frames": counts.tolist(),
            "codes": codes.transpose(1, 2).tolist(),
            "target_tokens": batch["target_tokens"].tolist(),
            "text_labels": inputs["text_labels"].tolist(),
            "audio_labels": inputs["audio_labels"].tolist(),
            **{key: float(result[key]) for key in ("loss", "text_loss", "audio_loss")},
        }
    shutil.rmtree(folder)
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "duplex.safetensors")
    (HERE / "duplex.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
