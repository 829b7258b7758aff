"""Kill `just demo` with SIGKILL in three places, start it again each time, and compare the reports.

    just prove demo       (from a clone where `just demo` has finished; about one demo long)

The finished out/ is the reference. It is moved aside, the demo is run anew and killed while it
makes shards, in the middle of stage 2 and between two evaluations. The last line says how many of
the report's numbers are identical.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

OUT, REFERENCE = Path("out"), Path("out.reference")


def shards_begun() -> bool:
    return len(list(OUT.glob("data/speech_train/shard-*.parquet"))) >= 3


def stage2_has_a_state() -> bool:
    return bool(list(OUT.glob("demo/stage2/state/step_*/.metadata")))


def one_epoch_is_scored() -> bool:
    return (OUT / "demo/evals/stage2/epoch_0/spoken_qa.json").exists()


def demo_until(reached: Callable[[], bool] | None) -> None:
    process = subprocess.Popen(["just", "demo"], start_new_session=True)
    while process.poll() is None:
        if reached is not None and reached():
            time.sleep(1.5)  # in the middle of the next piece of work
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"killed where {reached.__name__}", flush=True)
            return
        time.sleep(0.2)
    if reached is not None or process.returncode != 0:
        sys.exit(f"the demo ended by itself with status {process.returncode}")


def main() -> None:
    if not (OUT / "demo/report.json").exists():
        sys.exit("no out/demo/report.json: run `just demo` first")
    OUT.rename(REFERENCE)
    for reached in (shards_begun, stage2_has_a_state, one_epoch_is_scored, None):
        demo_until(reached)
    one, two = (json.loads((p / "demo/report.json").read_text()) for p in (REFERENCE, OUT))
    same = sum(a == b for a, b in zip(one, two, strict=True))
    print(f"{same} of {len(one)} identical")
    sys.exit(same != len(one))


if __name__ == "__main__":
    main()
