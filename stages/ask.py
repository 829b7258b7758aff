"""Ask the trained model a spoken question.

    python -m stages.ask recipes/demo/ask.yaml file=question.wav
    python -m stages.ask recipes/demo/ask.yaml file=words.wav request="repeat:"
    python -m stages.ask recipes/demo/ask.yaml file=words.wav task=transcribe

In: an audio file. Out, on the screen: what the model heard and what it answers. It uses the epoch
that the report chose, or `checkpoint`, or that of a `task`; where that has an encoder of its own,
in place of `quantizer`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import config
from speechfuse.audio import decoding
from speechfuse.config import key
from speechfuse.quantizer.spec import check_files
from speechfuse.serve import checkpoints
from speechfuse.tokens import prompts


@dataclass
class Ask:
    file: str = key("the audio file with the question")
    report: str = key("report.json, which names the chosen checkpoint")
    quantizer: str = key("folder of ours, or a published WhisperVQ .model file")
    whisper: str | None = key("openai-whisper .pt beside a .model", None)
    window: float | None = key("seconds that the .pt's encoder was cut to", None, above=0)
    encoder: dict[str, Any] = key(
        "of speechfuse.quantizer, for a checkpoint that takes frames of another than quantizer",
        {},
    )
    checkpoint: str | None = key("this one instead of the chosen", None)
    tasks: dict[str, str] = key("of a task the checkpoint with its state or adapter, by name", {})
    task: str | None = key("one of tasks, in place of the chosen checkpoint", None)
    repeat_first: bool = key("it was trained to repeat the question on the first line", False)
    request: str = key("words before the audio, as it was trained with them: repeat:", "")
    prompt: str = key("the same where words stand behind it too: {speech} is the audio", "{speech}")
    max_new_tokens: int = key("longest reply", 64, least=1)
    sampling: dict[str, Any] = key("temperature, top_k, top_p, repetition_penalty; else greedy", {})


def main(job: Ask) -> None:
    prompt = job.request + job.prompt
    if prompt.count("{speech}") != 1:
        raise ValueError(f"{prompt=} must hold {{speech}} once, and request={{speech}} never")
    if job.task and (job.task not in job.tasks or job.checkpoint):
        names = ", ".join(job.tasks) or "none is stated"
        raise ValueError(f"task={job.task}: choose one of tasks ({names}), and no checkpoint")
    waveform = decoding.load(Path(job.file))
    given = job.tasks.get(job.task or "", job.checkpoint)
    chosen = given or checkpoints.chosen_checkpoint(Path(job.report))
    check_files(job.quantizer, job.whisper)
    listener = checkpoints.load(Path(chosen), job, job.file)
    pieces = listener.pieces(waveform)
    left_out = (len(waveform) - sum(map(len, pieces))) / decoding.SAMPLE_RATE
    if left_out >= 0.1:
        print(f"{left_out:.1f} s of silence at its ends are left out", file=sys.stderr)
    if len(pieces) > 1:
        print(f"{len(waveform) / decoding.SAMPLE_RATE:.1f} s of audio in {len(pieces)} pieces")
    before, after = ([{"text": t}] if t else [] for t in prompt.split("{speech}"))
    segments = [*before, *listener.speech(pieces), *after]
    turns = [{"role": "user", "segments": segments}]
    length = len(listener.generator.prompt(turns)) + job.max_new_tokens
    most = getattr(listener.generator.model.config, "max_position_embeddings", length)
    if length > most:
        raise ValueError(
            f"{job.file}: with the reply it is {length:,} tokens, and this model reads {most:,} at "
            "most: ask a shorter recording"
        )
    from speechfuse.evals import generation  # torch with it

    listener.generator.sampling = generation.sampling(job.sampling)
    (answer,) = listener.generator.reply([turns], job.max_new_tokens)
    if job.repeat_first:
        heard, answer = prompts.read_spoken_answer(answer)
        if heard:  # it was asked for an answer, and not to repeat alone
            print(f"heard:  {heard}")
    print(f"answer: {answer}")


if __name__ == "__main__":
    config.main(main, Ask, __doc__, ("file",))
