"""Peak memory of tokenizing a corpus, and of one ten times larger.

    just bench memory [clips=N]                 (about 2 minutes on two cores)

Peak: resident memory summed over the job's processes, polled; shared pages count in each of them.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from tests.prove_tokenize import make_corpus, start


def resident(group: int) -> int:
    """Bytes of all processes of a process group."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                pages = int((folder / "statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it has just ended
            continue
    return total


def peak(corpus: Path, out: Path) -> int:
    job, most = start(corpus, out), 0
    while job.poll() is None:
        most = max(most, resident(job.pid))
        time.sleep(0.05)
    if job.returncode:
        sys.exit(f"the job failed: {job.communicate()[1].decode()[-500:]}")
    return most


def main() -> None:
    clips = int(dict(a.split("=") for a in sys.argv[1:]).get("clips", 240))
    with tempfile.TemporaryDirectory() as temporary:
        peaks = []
        for count in (clips, 10 * clips):
            corpus = Path(temporary) / str(count)
            make_corpus(corpus, count)
            peaks.append(peak(corpus, Path(temporary) / f"out-{count}"))
            print(f"{count} clips: peak {peaks[-1] / 1e9:.3f} GB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
