"""Make an untrained Llama-3 or RWKV checkpoint with a tokenizer of its own, for a base model that
is trained from nothing.

    python recipes/demo/init_base.py recipes/demo/init_base.yaml

In: a dataset of text conversations. Out: Hugging Face files (config, safetensors, a byte-level BPE
tokenizer trained on those texts, with Llama 3's control tokens and chat template).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from speechfuse import artifact, config, failures
from speechfuse.config import key
from speechfuse.rows import shards
from speechfuse.rwkv.hugging_face import Rwkv67Config, Rwkv67ForCausalLM
from speechfuse.tokens.vocabulary import CHAT_TEMPLATE

CONTROL = [  # the names, and the order, of Llama 3
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
LLAMA3_SPLIT = (  # the pre-tokenizer of Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class InitBase:
    out: str = key("folder of the checkpoint")
    texts: str = key("conversations that the tokenizer is trained on")
    vocab_size: int = key("text tokens and bytes, control tokens not counted", least=1)
    hidden_size: int = key("width", least=1)
    num_layers: int = key("decoder layers", least=1)
    num_heads: int = key("attention heads, and key/value heads", least=1)
    intermediate_size: int = key("width of the gated MLP", least=1)
    max_seq_len: int = key("longest sequence in tokens", 2048, least=1)
    extra_texts: list[str] = key("more tokenizer text", [])
    rwkv: dict[str, Any] | None = key("RWKV instead of Llama: {version, ranks}", None)
    seed: int = key("of the weights", 0, least=0)
    fresh: bool = key("move an artifact that differs aside", False)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's split and control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main(job: InitBase) -> None:
    out, texts = Path(job.out), Path(job.texts)
    inputs = {"texts": artifact.fingerprint_of(texts)}
    settings = {key: value for key, value in asdict(job).items() if key != "rwkv" or value}
    work = artifact.Artifact(out, "init_base", 1, settings, inputs)
    if not work.begin(fresh=job.fresh):
        return
    lines = [
        segment["text"]
        for row in shards.read_rows(texts, ["turns"])
        for turn in row["turns"]
        for segment in turn["segments"]
    ]
    lines += job.extra_texts + ["user assistant\n\n"] * 100
    tokenizer = train_tokenizer(lines, job.vocab_size)
    names = "bos_token_id", "eos_token_id", "pad_token_id"
    ids = {name: getattr(tokenizer, name) for name in names}
    torch.manual_seed(job.seed)
    sizes = ids | {
        "vocab_size": len(tokenizer),
        "hidden_size": job.hidden_size,
        "num_hidden_layers": job.num_layers,
        "num_attention_heads": job.num_heads,
        "intermediate_size": job.intermediate_size,
    }
    model = Rwkv67ForCausalLM(Rwkv67Config(**sizes, **job.rwkv)) if job.rwkv else llama(job, sizes)
    model.generation_config = GenerationConfig(**ids)
    with failures.writing(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    outputs = sorted(p for p in out.iterdir() if p.name[0] != "." and p.name != "plan.json")
    work.finish({"parameters": parameters, "vocabulary": len(tokenizer)}, outputs)
    print(f"{out}: {parameters:,} parameters, {len(tokenizer)} tokens")


def llama(job: InitBase, sizes: dict[str, Any]) -> LlamaForCausalLM:
    """Return an untrained Llama of these sizes."""
    shape = LlamaConfig(
        **sizes,
        num_key_value_heads=job.num_heads,
        # stock transformers warns where it is not above original_max_position_embeddings
        max_position_embeddings=max(job.max_seq_len, 9216),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={  # Llama 3.1's, as torchtune's llama3_1 builder has it
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    return LlamaForCausalLM(shape)


if __name__ == "__main__":
    config.main(main, InitBase, __doc__)
