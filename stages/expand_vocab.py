"""Give a Llama checkpoint the sound tokens of a quantizer.

    python -m stages.expand_vocab recipes/demo/expand_vocab.yaml

In: a Hugging Face checkpoint and a quantizer. Out: the checkpoint with sound_start, sound_end, one
token per code and the mask code; the id layout and the quantizer's identity stand in its
config.json. A published Ichigo or Llama3-s has these tokens: they and their rows are kept, and
`quantizer` must be the one that it was trained with, which it does not say itself.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.quantizer.spec import check_files, settled
from speechfuse.tokens import vocabulary, weights


@dataclass
class ExpandVocab:
    out: str = key("folder of the expanded checkpoint")
    base: str = key("Hugging Face folder of a Llama-3 model")
    quantizer: str = key("folder of ours, or a published WhisperVQ .model file")
    whisper: str | None = key("openai-whisper .pt beside a .model", None)
    window: float | None = key("seconds that the .pt's encoder was cut to", None, above=0)
    initialize: dict[str, Any] = key(
        "values of the new rows: normal, mean, mean_and_covariance or codebook",
        {"_component_": "speechfuse.tokens.codebook"},
    )
    seed: int = key("of the new rows", 0, least=0)
    fresh: bool = key("move an artifact that differs aside", False)


def main(job: ExpandVocab) -> None:
    out, base = Path(job.out), Path(job.base)
    weights.files(base)
    check_files(job.quantizer, job.whisper)
    from speechfuse.quantizer.model import Quantizer  # imports torch, so it comes after checks
    from speechfuse.tokens import expansion

    weights.headers(base)
    quantizer = Quantizer.load(job.quantizer, job.whisper, job.window)
    codes = quantizer.codebook_size
    there = expansion.has_sound_tokens(base, vocabulary.tokenizer_of(base), codes)
    inputs = {"base": artifact.fingerprint_of_files(base), "quantizer": quantizer.identity}
    inputs |= {"sound tokens": "of the base"} if there else {}
    work = artifact.Artifact(out, "expand_vocab", 2, settled(asdict(job)), inputs)
    if not work.begin(fresh=job.fresh):
        return
    layout = expansion.expand(
        base, out, codes, quantizer.identity, job.seed, job.initialize, quantizer.codebook[:codes]
    )
    outputs = sorted(p for p in out.iterdir() if p.name[0] != "." and p.name != "plan.json")
    work.finish(asdict(layout), outputs)
    if there:
        print(
            f"{base} has these sound tokens: they and their rows are kept, initialize and seed "
            "have no effect; it does not say which quantizer it was trained with, so that "
            f"{job.quantizer} is recorded"
        )
    print(
        f"{out}: sound_start {layout.start}, sound_end {layout.end}, codes {layout.first} to "
        f"{layout.first + layout.codes}; "
        f"set model.vocab_size={vocabulary.read_config(out)['vocab_size']}"
    )


if __name__ == "__main__":
    config.main(main, ExpandVocab, __doc__)
