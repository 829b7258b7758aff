"""Give a Llama checkpoint the sound tokens of a quantizer.

    python -m stages.expand_vocab recipes/demo/expand_vocab.yaml

In: a Hugging Face checkpoint and a quantizer. Out: the checkpoint with sound_start, sound_end, one
token per code and the mask code; the id layout and the quantizer's identity stand in its
config.json.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.quantizer.spec import check_files
from speechfuse.tokens import vocabulary


@dataclass
class ExpandVocab:
    out: str = key("folder of the expanded checkpoint")
    base: str = key("Hugging Face folder of a Llama-3 model")
    quantizer: str = key("folder of ours, or a published WhisperVQ .model file")
    whisper: str | None = key("openai-whisper .pt beside a .model", None)
    initialize: dict[str, Any] = key(
        "values of the new rows: normal, mean, mean_and_covariance or codebook",
        {"_component_": "speechfuse.tokens.codebook"},
    )
    seed: int = key("of the new rows", 0)
    fresh: bool = key("move an artifact that differs aside", False)


def main(job: ExpandVocab) -> None:
    out, base = Path(job.out), Path(job.base)
    vocabulary.read_config(base)
    check_files(job.quantizer, job.whisper)
    from speechfuse.quantizer.model import Quantizer  # imports torch, so it comes after checks
    from speechfuse.tokens import expansion

    quantizer = Quantizer.load(Path(job.quantizer), Path(job.whisper) if job.whisper else None)
    inputs = {"base": artifact.fingerprint_of_files(base), "quantizer": quantizer.identity}
    work = artifact.Artifact(out, "expand_vocab", 2, asdict(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    codes = quantizer.codebook_size
    layout = expansion.expand(
        base, out, codes, quantizer.identity, job.seed, job.initialize, quantizer.codebook[:codes]
    )
    outputs = sorted(p for p in out.iterdir() if p.name[0] != "." and p.name != "plan.json")
    work.finish(asdict(layout), outputs)
    print(
        f"{out}: sound_start {layout.start}, sound_end {layout.end}, codes {layout.first} to "
        f"{layout.first + layout.codes}; "
        f"set model.vocab_size={vocabulary.read_config(out)['vocab_size']}"
    )


if __name__ == "__main__":
    config.main(main, ExpandVocab, __doc__)
