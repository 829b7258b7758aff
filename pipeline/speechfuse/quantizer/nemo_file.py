"""The FastConformer in one of NeMo's `.nemo` files or folders, read without NeMo.

In: a plain tar of model_config.yaml and model_weights.ckpt, or what config.json and the weights of
a folder hold. Out: sizes of the encoder and of its
log-mel, and all tensors, under the names that transformers has for them. Nothing is unpacked to the
disk, and no pickled code is run.
"""

import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from speechfuse.audio.decoding import SAMPLE_RATE

LARGEST = 1 << 24  # bytes of the YAML
NAMES = {  # of NeMo's tensors -> transformers'; the others are the same
    r"^(.*\.)?pre_encode\.conv\.": r"\1subsampling.layers.",
    r"^(.*\.)?pre_encode\.out\.": r"\1subsampling.linear.",
    r"pos_enc\.": "encode_positions.",
    r"self_attn\.linear_([qkv])\.": r"self_attn.\1_proj.",
    r"self_attn\.linear_out": "self_attn.o_proj",
    r"self_attn\.linear_pos": "self_attn.relative_k_proj",
    r"self_attn\.pos_bias_([uv])": r"self_attn.bias_\1",
    r"conv\.batch_norm\.": "conv.norm.",
}
# what the parts of model_config.yaml must say, where they do
ENCODER: dict[str, Any] = {"_target_": "nemo.collections.asr.modules.ConformerEncoder"}
ENCODER |= {"subsampling": "dw_striding", "self_attention_model": "rel_pos", "untie_biases": True}
ENCODER |= {"conv_norm_type": "batch_norm", "causal_downsampling": False, "conv_context_size": None}
ENCODER |= {"att_context_size": [-1, -1], "reduction": None, "feat_out": -1, "global_tokens": 0}
MEL: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "normalize": "per_feature", "window": "hann"}
MEL |= {"frame_splicing": 1, "log": True, "mag_power": 2.0, "exact_pad": False, "lowfreq": 0}
MEL |= {"log_zero_guard_type": "add", "log_zero_guard_value": 2**-24, "highfreq": None}
ONLY = {"encoder": ENCODER, "preprocessor": MEL | {"mel_norm": "slaney"}}
# NeMo's defaults, of what it may leave out
SIZES: dict[str, Any] = {"_target_": None, "subsampling": "striding", "subsampling_factor": 4}
SIZES |= {"subsampling_conv_channels": -1, "ff_expansion_factor": 4, "n_heads": 4}
SIZES |= {"conv_kernel_size": 31, "xscaling": True, "use_bias": True}
WINDOWS = {"window_size": 0.02, "window_stride": 0.01, "features": 64, "preemph": 0.97}
DEFAULTS = {"encoder": SIZES, "preprocessor": WINDOWS}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return (sizes of the encoder, of its log-mel, tensors). Raises ValueError for a file that is
    damaged or of another architecture."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = {each.name.removeprefix("./"): each for each in tar if each.isfile()}
            if (size := members["model_config.yaml"].size) > LARGEST:
                raise RuntimeError(f"model_config.yaml has {size:,} bytes")
            settings, stored = (
                tar.extractfile(members[name])
                for name in ("model_config.yaml", "model_weights.ckpt")
            )
            stated = yaml.safe_load(settings)  # type: ignore[arg-type]
            tensors = torch.load(stored, "cpu", weights_only=True)  # type: ignore[arg-type]
        if not all(isinstance(each, Tensor) for each in tensors.values()):
            raise TypeError("its weights are no tensors")
    except (
        *(tarfile.TarError, yaml.YAMLError, pickle.UnpicklingError),
        *(AttributeError, EOFError, KeyError, RuntimeError, TypeError),
    ) as error:
        reason = "it has code" if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(
            f"{path} is no .nemo file with an encoder ({reason}): it must be a plain tar of "
            "model_config.yaml and a model_weights.ckpt of tensors alone"
        ) from None
    return encoder_of(path, stated, tensors)


def encoder_of(
    path: Path, stated: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return (sizes of the encoder, of its log-mel, tensors by transformers' names) of a model that
    hears or of a recognizer, whose configuration is `stated` at `path`. Raises ValueError for
    another architecture."""
    try:
        perception = stated.get("perception", stated)
        parts = {name: DEFAULTS[name] | perception[name] for name in ONLY}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its configuration has no encoder and log-mel ({error})"
        ) from None
    for name, wanted in ONLY.items():
        for key, value in wanted.items():
            found = parts[name].get(key, value)
            if found != value and not (key == "att_context_size" and not found):
                raise ValueError(
                    f"{path} is of another architecture: its {name}.{key} is {found!r:.60}, and "
                    f"that of a FastConformer that can be read here is {value!r}"
                )
    for pattern, theirs in NAMES.items():
        tensors = {re.sub(pattern, theirs, name): tensor for name, tensor in tensors.items()}
    try:
        return *_sizes(parts["encoder"], parts["preprocessor"]), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a size in its configuration is wrong: {error}") from None


def _sizes(encoder: dict[str, Any], mel: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    width, channels = int(encoder["d_model"]), int(encoder["subsampling_conv_channels"])
    length = round(mel["window_size"] * SAMPLE_RATE)
    return {
        "hidden_size": width,
        "num_hidden_layers": int(encoder["n_layers"]),
        "num_attention_heads": int(encoder["n_heads"]),
        "intermediate_size": width * int(encoder["ff_expansion_factor"]),
        "num_mel_bins": int(encoder["feat_in"]),
        "subsampling_factor": int(encoder["subsampling_factor"]),
        "subsampling_conv_channels": width if channels == -1 else channels,
        "conv_kernel_size": int(encoder["conv_kernel_size"]),
        "scale_input": bool(encoder["xscaling"]),
        "attention_bias": bool(encoder["use_bias"]),
        "convolution_bias": bool(encoder["use_bias"]),
    }, {
        "feature_size": int(mel["features"]),
        "n_fft": int(mel.get("n_fft") or 1 << (length - 1).bit_length()),
        "win_length": length,
        "hop_length": round(mel["window_stride"] * SAMPLE_RATE),
        "preemphasis": float(mel["preemph"]),
    }
