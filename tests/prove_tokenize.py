"""Tokenize one corpus in many ways and compare the shards byte for byte.

    just prove tokenize                 (about 6 minutes on two cores; needs the extra cluster)

The corpus is made here: spoken sentences as wav, flac, ogg and mp3 at several rates, one recording
to be split, files that are no audio. Ways: one worker, two, different numbers of threads and clips
ahead, two Ray actors, two Ray actors of which one is killed, and KILLS runs that are killed with
SIGKILL at a random moment and started again. The last line says how many are identical.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr

from speechfuse.audio import espeak_ng

KILLS = 20
FORMATS = [("wav", 16_000), ("flac", 44_100), ("ogg", 24_000), ("mp3", 22_050), ("wav", 8_000)]
WORDS = "one two three four five six seven eight nine ten red green blue".split()
RAY = ["runtime.engine._component_=speechfuse.ray_cluster.ray_actors", "runtime.engine.cpus=0.5"]


def make_corpus(folder: Path, clips: int = 240) -> None:
    rng = random.Random(0)
    with espeak_ng.EspeakLibrary() as engine:
        for i in range(clips):
            text = " ".join(rng.choices(WORDS, k=90 if i == 7 else rng.randint(3, 12)))
            suffix, rate = FORMATS[i % len(FORMATS)]
            waveform = engine.speak(text, espeak_ng.EspeakVoice("en-us+Annie")).waveform
            samples = soxr.resample(waveform, 16_000, rate)
            if i % 4 == 0:
                samples = np.stack([samples, samples * 0.5], axis=1)
            path = folder / f"{i % 3}" / f"{i:03d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, rate)
            path.with_suffix(".txt").write_text(text)
    (folder / "0" / "letter.wav").write_text("Dear listener, this is no audio.")
    (folder / "1" / "nothing.flac").write_bytes(b"")


def start(corpus: Path, out: Path, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "stages.tokenize_speech",
        "recipes/demo/tokenize.yaml",
        f"out={out}",
        f"corpus.path={corpus}",
        "shard_size=12",
        "batch_size=4",
        *overrides,
    ]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the job failed: {errors.decode()[-500:]}")


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def shards_in(out: Path) -> int:
    return len(list(out.glob("shard-*.parquet")))


def kill_one_actor(process: subprocess.Popen, out: Path) -> None:
    """SIGKILL for a Ray worker that is inside a shard."""
    while process.poll() is None:
        if shards_in(out) >= 2:
            for status in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if status.read_bytes().startswith(b"ray::Worker.run"):
                        os.kill(int(status.parent.name), signal.SIGKILL)
                        return
                except OSError:
                    continue
        time.sleep(0.01)
    sys.exit("the job ended before a Ray worker could be killed")


def result(out: Path) -> str:
    """One hash of all shards, reject lists and totals."""
    digest = hashlib.sha256()
    for path in sorted(out.glob("shard-*")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(json.dumps(json.loads((out / "manifest.json").read_text())["totals"]).encode())
    return digest.hexdigest()


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        corpus, outs = Path(temporary) / "corpus", Path(temporary) / "out"
        make_corpus(corpus)
        found: dict[str, str] = {}

        def record(way: str) -> None:
            found[way] = result(outs / way.replace(" ", "-"))
            print(f"{found[way][:16]}  {way}", flush=True)

        def whole(way: str, *overrides: str) -> tuple[float, float]:
            begin, out = time.monotonic(), outs / way.replace(" ", "-")
            job = start(corpus, out, *overrides)
            while not (out / "plan.json").exists() and job.poll() is None:
                time.sleep(0.01)
            planned = time.monotonic() - begin
            finish(job)
            record(way)
            return planned, time.monotonic() - begin

        whole("1 worker", "runtime.workers=1")
        planned, seconds = whole("2 workers")
        whole("1 thread 1 ahead", "runtime.decode_threads=1", "runtime.prefetch=1")
        whole("4 threads 100 ahead", "runtime.decode_threads=4", "runtime.prefetch=100")
        whole("2 Ray actors", *RAY)
        way = "2 Ray actors, one killed"
        job = start(corpus, outs / way.replace(" ", "-"), *RAY)
        kill_one_actor(job, outs / way.replace(" ", "-"))
        finish(job)
        record(way)
        rng = random.Random(time.time_ns())
        for i in range(KILLS):
            out = outs / f"kill-{i}"
            job = start(corpus, out)
            time.sleep(rng.uniform(planned - 1, seconds))
            kill(job)
            had = shards_in(out)
            finish(start(corpus, out))
            way = f"killed with {had} shards done, resumed"
            found[f"{i} {way}"] = result(out)
            print(f"{found[f'{i} {way}'][:16]}  {way}", flush=True)
        same = sum(each == found["1 worker"] for each in found.values())
        print(f"{same} of {len(found)} identical")
        sys.exit(same != len(found))


if __name__ == "__main__":
    main()
