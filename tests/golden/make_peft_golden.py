"""Write what peft makes of a LoRA: peft_lora.safetensors and peft_lora.json beside this file.

    python tests/golden/make_peft_golden.py          (in an environment with peft 0.18)
    python tests/golden/make_peft_golden.py EPOCH    (compare with EPOCH/logits.safetensors)

The first makes a tiny Llama and a LoRA of random numbers as peft writes it, with logits of both.
The second loads a folder that we wrote, base and lora/, with peft, and prints the largest
difference from our logits, which lie beside it. peft above 0.18 refuses the torchao that torchtune
needs, so that it is no library of this project.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    weights = {f"base.{name}": tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.arange(24).reshape(2, 12) % SHAPE["vocab_size"]
    with torch.no_grad():
        plain = base(ids).logits
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(base, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        logits = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        lora = load_file(f"{folder}/adapter_model.safetensors")
        settings = json.loads(Path(folder, "adapter_config.json").read_text())
    weights |= {f"lora.{name}": tensor for name, tensor in lora.items()}
    save_file(
        weights | {"ids": ids, "plain": plain, "logits": logits}, HERE / "peft_lora.safetensors"
    )
    text = json.dumps({"shape": SHAPE, "adapter_config": settings}, indent=1, sort_keys=True)
    (HERE / "peft_lora.json").write_text(text + "\n")


def compare(epoch: Path) -> None:
    ours = load_file(epoch / "logits.safetensors")
    base = AutoModelForCausalLM.from_pretrained(epoch, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(ours["ids"]).logits
        logits = PeftModel.from_pretrained(base, epoch / "lora").eval()(ours["ids"]).logits
    print(f"LoRA moves logits by up to {(logits - plain).abs().max():.3g}")
    print(f"largest difference from ours: {(logits - ours['logits']).abs().max():.3g}")


if __name__ == "__main__":
    compare(Path(sys.argv[1])) if sys.argv[1:] else make()
