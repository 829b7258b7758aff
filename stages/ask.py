"""Ask the trained model a spoken question.

    python -m stages.ask recipes/demo/ask.yaml file=question.wav
    python -m stages.ask recipes/demo/ask.yaml file=words.wav request="repeat:"

In: an audio file. Out, on the screen: what the model heard and what it answers. It uses the epoch
that the report chose, or `checkpoint`; where that has an encoder of its own, in place of
`quantizer`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from speechfuse import config
from speechfuse.audio import decoding
from speechfuse.config import key
from speechfuse.provenance import maker
from speechfuse.quantizer.spec import check_files
from speechfuse.tokens import prompts


@dataclass
class Ask:
    file: str = key("the audio file with the question")
    report: str = key("report.json, which names the chosen checkpoint")
    quantizer: str = key("folder of ours, or a published WhisperVQ .model file")
    whisper: str | None = key("openai-whisper .pt beside a .model", None)
    window: float | None = key("seconds that the .pt's encoder was cut to", None, above=0)
    checkpoint: str | None = key("this one instead of the chosen", None)
    repeat_first: bool = key("it was trained to repeat the question on the first line", False)
    request: str = key("words before the audio, as it was trained with them: repeat:", "")
    prompt: str = key("the same where words stand behind it too: {speech} is the audio", "{speech}")
    max_new_tokens: int = key("longest reply", 64, least=1)


def chosen_checkpoint(report: Path) -> Path:
    """Return the folder of the checkpoint that `report` marks as chosen: its run is expected in the
    report's folder. Raises FileNotFoundError without a report."""
    if not report.is_file():
        raise FileNotFoundError(
            f"no report at {report}: {maker(str(report))}; or give checkpoint=FOLDER"
        )
    try:
        rows = json.loads(report.read_text("utf-8"))
        names = {Path(row["checkpoint"]) for row in rows if row["chosen"] is True}
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{report} is no report, a list of {{checkpoint, chosen, ...}}: {maker(str(report))}"
        ) from None
    if len(names) != 1:
        raise ValueError(f"{report} marks {len(names)} checkpoints as chosen: {maker(str(report))}")
    return report.parent / names.pop()


def main(job: Ask) -> None:
    prompt = job.request + job.prompt
    if prompt.count("{speech}") != 1:
        raise ValueError(f"{prompt=} must hold {{speech}} once, and request={{speech}} never")
    waveform = decoding.load(Path(job.file))
    checkpoint = Path(job.checkpoint) if job.checkpoint else chosen_checkpoint(Path(job.report))
    check_files(job.quantizer, job.whisper)
    from speechfuse.evals import generation  # torch with it: what can be refused has been
    from speechfuse.quantizer import foreign
    from speechfuse.quantizer.model import Quantizer

    if (own := checkpoint / "encoder").is_dir():  # it trained with the rest
        quantizer: Quantizer = foreign.trained(own)
    else:
        quantizer = Quantizer.load(job.quantizer, job.whisper, job.window)
    generator = generation.generator(checkpoint, quantizer.identity, job.file)
    pieces = decoding.split(waveform, quantizer.window)
    if len(pieces) > 1:
        print(f"{len(waveform) / decoding.SAMPLE_RATE:.1f} s of audio in {len(pieces)} pieces")
    before, after = ([{"text": t}] if t else [] for t in prompt.split("{speech}"))
    segments = [*before, *generator.speech(quantizer, pieces), *after]
    turns = [{"role": "user", "segments": segments}]
    (answer,) = generator.reply([turns], job.max_new_tokens)
    if job.repeat_first:
        heard, answer = prompts.read_spoken_answer(answer)
        if heard:  # it was asked for an answer, and not to repeat alone
            print(f"heard:  {heard}")
    print(f"answer: {answer}")


if __name__ == "__main__":
    config.main(main, Ask, __doc__, ("file",))
