"""`python -m tests.sim --seed N` repeats one seed; `--seeds 0:10000` runs a range of them."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from tests.sim.planted import PLANTED
from tests.sim.world import SeedFailedError, run_seed


def main() -> int:
    """Return 0 when every seed passed, 1 after the story of the first one that did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one and print what happened")
    parser.add_argument("--seeds", default="0:300", help="START:STOP")
    parser.add_argument("--plant", choices=sorted(PLANTED), help="with this bug planted")
    options = parser.parse_args()
    logging.getLogger("moveline").setLevel(logging.CRITICAL)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    else:
        seeds = range(*(int(part) for part in options.seeds.split(":")))
    started = time.monotonic()
    with PLANTED[options.plant].planted() if options.plant else nullcontext():
        failed = run_all(seeds, is_told=options.seed is not None)
    if failed is not None:
        sys.stdout.write(f"{failed}\nrepeat it with: make sim SEED={failed.seed}\n")
        return 1
    sys.stdout.write(f"{len(seeds)} seeds passed in {time.monotonic() - started:.1f} s\n")
    return 0


def run_all(seeds: range, *, is_told: bool) -> SeedFailedError | None:
    """Run the seeds in order; return the first failure."""
    console = Console(stderr=True)
    columns = ("seeds", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=False) as progress:
        for seed in progress.track(seeds):
            try:
                world = run_seed(seed)
            except SeedFailedError as error:
                return error
            if is_told:
                sys.stdout.write("\n".join(world.trace) + "\n")
    return None


if __name__ == "__main__":
    sys.exit(main())
