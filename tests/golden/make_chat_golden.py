"""Golden prompt ids of NVIDIA NeMo's prompt formatters (tests/test_layouts.py).

    .venv-nemo/bin/python tests/golden/make_chat_golden.py

In: nothing; make_speechlm2_golden.py says how the environment is made. Out, beside this file: chat/
with a small tokenizer of each family that carries its control tokens, and chat.json with 20
conversations and their ids in each layout.
"""

import json
import os
import random
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

from nemo.collections.common.prompts.formatter import PromptFormatter
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from tokenizers import ByteLevelBPETokenizer, Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
FAMILIES = {  # begin, end, other control tokens
    "llama2": ("<s>", "</s>", []),
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen": (None, "<|im_end|>", ["<|im_start|>"]),
}
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"  # Llama 3's
WORDS = (
    "what is the capital of spain ? Madrid . one two  three\n\n Repeat: it's 'red' äöü 17".split(
        " "
    )
)


def main() -> None:
    chance = random.Random(0)

    def text() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 9))).strip() or "what"

    dialogs = []
    for number in range(20):
        turns = [("user", text()) for _ in range(1)]
        for _ in range(number % 3):
            turns += [("assistant", text()), ("user", text())]
        turns.append(("assistant", text()))
        dialogs.append(([("system", text())] if number % 4 == 3 else []) + turns)
    found = {"dialogs": dialogs}
    for family, (begin, end, control) in FAMILIES.items():
        trained = ByteLevelBPETokenizer()
        words = Split(Regex(SPLIT), "isolated")
        trained._tokenizer.pre_tokenizer = Sequence([words, ByteLevel(False, use_regex=False)])
        trained.train_from_iterator([" ".join(WORDS)] * 9, vocab_size=300, show_progress=False)
        tokens = {"bos_token": begin, "eos_token": end, "additional_special_tokens": control}
        tokens = {name: token for name, token in tokens.items() if token}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **tokens)
        tokenizer.save_pretrained(HERE / "chat" / family)
        formatter = PromptFormatter.resolve(family)(AutoTokenizer(str(HERE / "chat" / family)))
        found[family] = []
        for dialog in dialogs:
            turns = [{"role": role, "slots": {"message": text}} for role, text in dialog]
            if dialog[0][0] == "system" and family == "llama2":
                slots = {"system": dialog[0][1], "message": dialog[1][1]}
                turns = [{"role": "system_and_user", "slots": slots}, *turns[2:]]
            elif dialog[0][0] == "system" and family == "qwen":
                turns = turns[1:]  # whose formatter has no system prompt
            found[family].append(formatter.encode_dialog(turns)["input_ids"].tolist())
    (HERE / "chat.json").write_text(json.dumps(found, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
