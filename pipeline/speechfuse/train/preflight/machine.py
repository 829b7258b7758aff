"""The memory of this machine that a run may still take.

In: nothing. Out: bytes. A container's limit (cgroup versions 1 and 2) counts as well as the
machine's memory, and so does what other processes have in use.
"""

import os
from pathlib import Path

LIMIT = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that a process here can still get. `root`: where proc and sys are."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # macOS: what is in use is not known
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = [int(fields["MemAvailable"].split()[0]) * 1024]
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        group = base / path.lstrip("/")
        # limits of the groups above hold too; a container sees its own group at the base
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                free += _left(folder)
    return max(0, min(free))


def _left(group: Path) -> list[int]:
    """Return [the bytes left in a cgroup], without cached files; [] where it has no limit."""
    for limit, usage in LIMIT.items():
        if (group / limit).is_file() and (most := (group / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return [int(most) - int((group / usage).read_text()) + cached]
    return []
