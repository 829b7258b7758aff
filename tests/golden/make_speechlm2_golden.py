"""Golden values of NVIDIA NeMo's own SALM, to which ours is held (tests/test_splice_golden.py).

    python3 -m venv .venv-nemo && .venv-nemo/bin/pip install -r requirements-nemo.txt
    .venv-nemo/bin/python tests/golden/make_speechlm2_golden.py

In: the demo's base model. Out: speechlm2.safetensors (frames of a small random FastConformer,
weights of the projection, spliced inputs, gradients) and speechlm2.json (token ids, masks, losses)
beside this file. The language model and the encoder are frozen, the projection trains.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from nemo.collections.speechlm2.models import SALM
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BASE = HERE.parent.parent / "recipes/demo/models/base"
WIDTH = 64
ENCODER = {
    "_target_": "nemo.collections.asr.modules.ConformerEncoder",
    "att_context_size": [-1, -1],
    "causal_downsampling": False,
    "conv_context_size": None,
    "conv_kernel_size": 9,
    "conv_norm_type": "batch_norm",
    "d_model": WIDTH,
    "dropout": 0.0,
    "dropout_att": 0.0,
    "dropout_emb": 0.0,
    "dropout_pre_encoder": 0.0,
    "feat_in": 80,
    "feat_out": -1,
    "ff_expansion_factor": 4,
    "n_heads": 4,
    "n_layers": 2,
    "pos_emb_max_len": 5000,
    "self_attention_model": "rel_pos",
    "subsampling": "dw_striding",
    "subsampling_conv_channels": 32,
    "subsampling_factor": 8,
}
PREPROCESSOR = {
    "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
    "dither": 0.0,
    "features": 80,
    "frame_splicing": 1,
    "log": True,
    "n_fft": 512,
    "normalize": "per_feature",
    "pad_to": 0,
    "pad_value": 0.0,
    "sample_rate": 16000,
    "window": "hann",
    "window_size": 0.025,
    "window_stride": 0.01,
}
CONFIG = {
    "pretrained_llm": str(BASE),
    "pretrained_asr": "none",
    "pretrained_weights": False,
    "prompt_format": "llama3",
    "audio_locator_tag": "<|audioplaceholder|>",
    "optimizer": {"_target_": "torch.optim.AdamW"},
    "freeze_params": ["^llm\\..+$", "^embed_tokens\\..+$", "^perception\\.encoder\\..+$"],
    "perception": {
        "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
        "output_dim": 160,
        "encoder": ENCODER,
        "modality_adapter": {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
            "d_model": WIDTH,
        },
        "preprocessor": PREPROCESSOR,
    },
}
A = "audio"  # the place of an audio in a prompt
CASES = {  # prompts of a batch, how many of the last ids of each are targets, samples of each audio
    "unequal padding": ([["bos", 5, A, 6, 7, 8], ["bos", A, 9, 10]], [2, 1], [16000, 12000]),
    "two audios in one prompt": (
        [["bos", 4, A, 5, A, 6, 7], ["bos", A, 8, 9]],
        [2, 2],
        [16000, 8000, 17280],
    ),
    "a prompt of text alone": ([["bos", 5, 6, 7, 8, 9], ["bos", 4, A, 10, 11]], [3, 2], [15999]),
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SALM(CONFIG)
    weights = load_file(BASE / "model.safetensors")
    model.embed_tokens.load_state_dict({"weight": weights.pop("model.embed_tokens.weight")})
    lost = model.llm.load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys and not lost.missing_keys, lost
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("perception.proj"))
    model.log = model.log_dict = lambda *_, **__: None
    model.perception.encoder.eval()
    tensors = {f"proj.{n}": p.detach() for n, p in model.perception.proj.named_parameters()}
    facts = {}
    for number, (name, (prompts, targets, samples)) in enumerate(CASES.items()):
        special = {"bos": model.text_bos_id, A: model.audio_locator_tag_id}
        ids = [[special.get(token, token) for token in prompt] for prompt in prompts]
        longest = max(map(len, ids))
        padded = [[model.text_pad_id] * (longest - len(row)) + row for row in ids]
        mask = [[place >= longest - n for place in range(longest)] for n in targets]
        audios = torch.randn(len(samples), max(samples))
        for row, size in zip(audios, samples, strict=True):
            row[size:] = 0
        lengths = torch.tensor(samples)
        batch = {"audios": audios, "audio_lens": lengths, "input_ids": torch.tensor(padded)}
        batch["loss_mask"] = torch.tensor(mask)
        model.zero_grad()
        result = model.training_step(batch, 0)
        result["loss"].backward()
        inputs = model.prepare_inputs(batch)
        _, counts, frames = model.perception(
            input_signal=audios, input_signal_length=lengths, return_encoder_emb=True
        )
        for clip, count in enumerate(counts.tolist()):
            tensors[f"{number}.frames.{clip}"] = frames[clip, :count].detach().clone()
        tensors[f"{number}.embeds"] = inputs["input_embeds"].detach()
        for key, parameter in model.perception.proj.named_parameters():
            tensors[f"{number}.gradient.{key}"] = parameter.grad.clone()
        facts[name] = {
            "prompts": [[None if token == special[A] else token for token in row] for row in ids],
            "targets": targets,
            "frames": counts.tolist(),
            "loss": float(result["loss"]),
            "target_ids": inputs["target_ids"].tolist(),
            "attention_mask": inputs["attention_mask"].long().tolist(),
        }
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "speechlm2.safetensors")
    (HERE / "speechlm2.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
