"""A folder in the layout of nvidia/canary-qwen-2.5b, by NVIDIA NeMo itself (tests/test_salm.py).

    .venv-nemo/bin/python tests/golden/make_salm_golden.py

In: chat/qwen beside this file; make_speechlm2_golden.py says how the environment is made. Out:
salm/config.json and salm/model.safetensors as SALM.save_pretrained writes them, of small random
weights in the settings of Canary-Qwen; salm.json with the configuration of the language model, and
a prompt with the replies to `waveform`s; salm.safetensors with the logits behind the prompt.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from make_fastconformer_golden import waveform
from make_speechlm2_golden import CONFIG, ENCODER, PREPROCESSOR
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.speechlm2.models import SALM
from safetensors.torch import save_file
from transformers import Qwen3Config

HERE = Path(__file__).parent
WIDTH, BANDS = 16, 128
LLM = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
}
ASKED = "Transcribe the following: "
LENGTHS = [16_000, 12_000]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(HERE / "chat/qwen", folder, dirs_exist_ok=True)
        Qwen3Config(**LLM, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
        settings = json.loads(Path(folder, "config.json").read_text())
        lora = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.01}
        encoder = {"d_model": WIDTH, "feat_in": BANDS, "n_heads": 2, "xscaling": False}
        adapter = CONFIG["perception"]["modality_adapter"] | {"d_model": WIDTH}
        perception = {
            **CONFIG["perception"],
            "output_dim": LLM["hidden_size"],
            "encoder": ENCODER | encoder | {"subsampling_conv_channels": 8},
            "modality_adapter": adapter,
            "preprocessor": PREPROCESSOR | {"features": BANDS},
        }
        stated = {"pretrained_llm": folder, "prompt_format": "qwen", "perception": perception}
        stated |= {"lora": lora | {"target_modules": ["q_proj", "v_proj"]}}
        model = SALM(CONFIG | stated | {"prevent_freeze_params": []}).eval()
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.data.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
        prompt = [{"role": "user", "content": ASKED + model.audio_locator_tag}]
        replies, tensors = [], {}
        formatter = PromptFormatter.resolve("qwen")(model.tokenizer)
        ids = formatter.encode_dialog(turns=prompt)["input_ids"]
        for samples in LENGTHS:
            audio = torch.from_numpy(waveform(samples))[None]
            how = {"audios": audio, "audio_lens": torch.tensor([samples]), "max_new_tokens": 8}
            how |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            made = model.generate(prompts=[prompt], **how)
            replies.append(made.sequences[0].tolist())
            tensors[str(samples)] = made.logits[0][0]
        model.cfg.pretrained_llm = "Qwen/Qwen3-1.7B"  # as it is published
        model.save_pretrained(HERE / "salm")
    (HERE / "salm/README.md").unlink(missing_ok=True)
    tag = model.audio_locator_tag_id
    facts = {"llm": settings, "asked": ASKED, "replies": replies}
    facts["ids"] = [None if id == tag else id for id in ids.tolist()]
    (HERE / "salm.json").write_text(json.dumps(facts, indent=1) + "\n")
    save_file(tensors, HERE / "salm.safetensors")


if __name__ == "__main__":
    main()
