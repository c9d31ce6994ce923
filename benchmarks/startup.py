"""How long `miles --help` and `miles plugins list` take with twenty more plugins and two hundred other distributions.

    python benchmarks/startup.py [repetitions]

Prints the least and the median of wall and CPU time. On a busy machine the least is the one to trust: everything that
disturbs a measurement makes it longer. Exits with 1 if the least wall time is over its limit.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS_MS = {("--help",): 150.0, ("plugins", "list"): 300.0}

MODULE = """\
from miles_core import LossSpec, RewardSpec, hookimpl


@hookimpl
def miles_losses():
    yield LossSpec(name="loss-{n}", ref="bench_{n}.loss:loss", summary="a loss", needs=frozenset({{"old_logprobs"}}))


@hookimpl
def miles_rewards():
    yield RewardSpec(name="reward-{n}", ref="bench_{n}.reward:Reward", summary="a reward")
"""


def make_site(folder: Path, plugins: int = 20, others: int = 200) -> None:
    """Writes distributions as pip leaves them behind."""
    for n in range(plugins + others):
        info = folder / f"bench_{n}-1.0.dist-info"
        info.mkdir()
        core = "Requires-Dist: miles-core<0.2,>=0.1\n" if n < plugins else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: bench-{n}\nVersion: 1.0\n{core}\n" + "text\n" * 200
        )
        group = f"miles.plugins]\nbench = bench_{n}" if n < plugins else f"console_scripts]\nbench-{n} = bench_{n}:main"
        (info / "entry_points.txt").write_text(f"[{group}\n")
        if n < plugins:
            (folder / f"bench_{n}.py").write_text(MODULE.format(n=n))


def measure(arguments: tuple[str, ...], site: Path, repetitions: int) -> tuple[list[float], list[float]]:
    """Wall and CPU milliseconds of each run of `miles ARGUMENTS`, sorted."""
    code = "import sys; from miles_core.cli.main import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    walls, cpus = [], []
    for _ in range(repetitions):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
        walls.append((time.perf_counter() - start) * 1e3)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3)
    return sorted(walls), sorted(cpus)


def main() -> int:
    """Measures both commands, in turn, and says whether they keep their limits."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    good = True
    with tempfile.TemporaryDirectory() as folder:
        make_site(Path(folder))
        for arguments, limit in LIMITS_MS.items():
            measure(arguments, Path(folder), 2)  # bytecode and the file cache
            walls, cpus = measure(arguments, Path(folder), repetitions)
            good = good and walls[0] <= limit
            print(
                f"miles {' '.join(arguments):14} wall {walls[0]:4.0f} (median {statistics.median(walls):4.0f}) ms, "
                f"CPU {cpus[0]:4.0f} (median {statistics.median(cpus):4.0f}) ms, limit {limit:.0f} ms"
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
