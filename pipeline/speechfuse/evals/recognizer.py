"""A recognizer from elsewhere as the judge of speech: pocketsphinx, for which each word of a list
is as likely as any other, whatever stands before it. It knows no sentence, so it completes none.

In: waveforms at 16 kHz. Out: the words that it hears.
"""

import re
from collections.abc import Iterable
from math import log10
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

BEAMS = {"beam": 1e-48, "wbeam": 1e-32, "maxhmmpf": 3000}
QUIET = np.zeros(3200)  # 0.2 s before and behind
LOUDEST = 0.7 * 32767


class Recognizer:
    """Hears `words` alone. `spoken`: the ARPAbet of those that its dictionary lacks. Raises
    ValueError for other such words, and where pocketsphinx is not installed."""

    def __init__(self, words: Iterable[str], spoken: dict[str, str]) -> None:
        try:
            from pocketsphinx import Decoder, get_model_path
        except ImportError:
            raise ValueError(
                "pocketsphinx is not installed: `just setup` does it, but of Python 3.12"
            ) from None
        model, own, alike = Path(get_model_path()) / "en-us", {*words}, dict[str, str]()
        lines = (model / "cmudict-en-us.dict").read_text("utf-8").splitlines()
        lines += [f"{word} {phones}" for word, phones in spoken.items()]
        entries = [(re.sub(r"\(\d+\)$", "", line.split()[0]), line) for line in lines]
        entries = [(word, line) for word, line in sorted(entries) if word in own]
        self.canonical: dict[str, str] = {}
        for word, line in entries:  # of words that sound alike the first stands for all
            same = alike.setdefault(line.partition(" ")[2], word)
            self.canonical[word] = min(same, self.canonical.get(word, same))
        if lost := sorted(own - self.canonical.keys()):
            raise ValueError(
                f"pocketsphinx knows no sound of {', '.join(lost)}: say it in `spoken`"
            )
        names = sorted({"<s>", "</s>", *own})
        grams = [f"{-log10(len(names)):.4f} {name}" for name in names]
        head = ["\\data\\", f"ngram 1={len(names)}", "", "\\1-grams:"]
        with TemporaryDirectory() as folder:
            texts = {
                "dict": [line for _, line in entries],
                "lm": [*head, *grams, "", "\\end\\", ""],
            }
            files = {name: f"{folder}/{name}" for name in texts}
            for name, content in texts.items():
                Path(files[name]).write_text("\n".join(content), "utf-8")
            settings: dict[str, Any] = {"hmm": str(model / "en-us"), "cmn": "batch", **BEAMS}
            self.decoder = Decoder(**settings, **files, loglevel="FATAL")

    def hear(self, waveform: np.ndarray) -> str:
        """Return what is heard in a waveform (samples,) at 16 kHz; "" where that is nothing."""
        peak = np.abs(waveform).max(initial=1e-6)
        sound = np.concatenate([QUIET, waveform / peak * LOUDEST, QUIET])
        self.decoder.start_utt()
        self.decoder.process_raw(sound.astype(np.int16).tobytes(), full_utt=True)
        self.decoder.end_utt()
        heard = self.decoder.hyp()
        return heard.hypstr if heard else ""

    def plain(self, text: str) -> str:
        """Return a text with one spelling for the words that sound alike ("won", "one")."""
        return " ".join(self.canonical.get(word, word) for word in text.lower().split())
