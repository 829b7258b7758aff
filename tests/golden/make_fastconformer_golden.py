"""Golden values of NVIDIA NeMo's own FastConformer, to which ours is held (tests/test_foreign.py).

    .venv-nemo/bin/python tests/golden/make_fastconformer_golden.py

In: nothing; make_speechlm2_golden.py says how the environment is made. Out, beside this file:
fastconformer_{plain,scaled}.nemo, small random models of speech recognition as NeMo saves them (one
without biases and with scaled inputs), and fastconformer.safetensors with the frames that they make
of the waveforms of `waveform`, each alone and all in one batch.
"""

import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
from nemo.collections.asr.models import EncDecCTCModel
from omegaconf import OmegaConf
from safetensors.torch import save_file

HERE = Path(__file__).parent
LENGTHS = [8_000, 15_999, 16_000, 16_001, 17_280, 32_000, 160_000]
PREPROCESSOR = {
    "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
    "sample_rate": 16000,
    "normalize": "per_feature",
    "window_size": 0.025,
    "window_stride": 0.01,
    "window": "hann",
    "features": 80,
    "n_fft": 512,
    "log": True,
    "frame_splicing": 1,
    "dither": 1e-5,
    "pad_to": 0,
    "pad_value": 0.0,
}
ENCODER = {
    "_target_": "nemo.collections.asr.modules.ConformerEncoder",
    "feat_in": 80,
    "feat_out": -1,
    "n_layers": 2,
    "d_model": 16,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "subsampling_conv_channels": 8,
    "causal_downsampling": False,
    "ff_expansion_factor": 4,
    "self_attention_model": "rel_pos",
    "n_heads": 4,
    "att_context_size": [-1, -1],
    "conv_kernel_size": 9,
    "conv_norm_type": "batch_norm",
    "conv_context_size": None,
}
DECODER = {
    "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
    "feat_in": 16,
    "num_classes": 2,
    "vocabulary": ["a", "b"],
}


def waveform(samples: int) -> np.ndarray:
    """Noise under a slow envelope, float32, the same in the test."""
    noise = np.random.default_rng(samples).normal(0, 0.1, samples)
    return (noise * (1 + np.sin(np.arange(samples) / 3000))).astype(np.float32)


def main() -> None:
    torch.set_num_threads(1)
    waveforms = [torch.from_numpy(waveform(samples)) for samples in LENGTHS]
    found = {}
    for name, changes in (
        ("plain", {"use_bias": True, "xscaling": False}),
        ("scaled", {"use_bias": False, "xscaling": True}),
    ):
        torch.manual_seed(0)
        settings = {"preprocessor": PREPROCESSOR, "encoder": ENCODER | changes, "decoder": DECODER}
        model = EncDecCTCModel(cfg=OmegaConf.create(settings | {"sample_rate": 16000})).eval()
        for part in model.encoder.modules():  # as trained ones have them
            if isinstance(part, torch.nn.BatchNorm1d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
        model.save_to(str(HERE / f"fastconformer_{name}.nemo"))
        with torch.inference_mode():
            for samples, each in zip(LENGTHS, waveforms, strict=True):
                length = torch.tensor([samples])
                mel, length = model.preprocessor(input_signal=each[None], length=length)
                frames, length = model.encoder(audio_signal=mel, length=length)
                found[f"{name}.{samples}"] = frames[0, :, : int(length)].T.contiguous()
    save_file(found, HERE / "fastconformer.safetensors")
    print({key: tuple(value.shape) for key, value in found.items()})


if __name__ == "__main__":
    main()
