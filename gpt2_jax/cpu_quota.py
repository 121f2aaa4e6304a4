"""The CPU time that a container may use: the quota of its Linux control groups, versions 1 and 2.

A process in `docker run --cpus 2` on a host of 64 CPUs sees all 64 of them. With 64 threads it would use up its time at the
beginning of each period and stand still for the rest.
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def cpu_quota(root: Path = Path("/")) -> int | None:
    """CPUs' worth of time that this process may use, rounded up; None without a limit, or where there are no control groups.

    Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us) of Linux. `root` is
    the folder that holds proc/ and sys/.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup/cpu"
        else:
            continue
        # Every group around this one limits it too. Inside a container the path may be the host's; the container's own limit
        # is then the mount's.
        inside = PurePosixPath(path.lstrip("/"))
        quotas += [quota for group in (inside, *inside.parents) if (quota := _quota_of(mount / group)) is not None]
    return math.ceil(min(quotas)) if quotas else None


def available_cpus() -> int:
    """CPUs that the system gives this process; a quota may allow less of their time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota_of(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError):
        return None
