"""Run cases and print each failure with the line that reproduces it: --cases N --seed FIRST."""

import argparse
import collections
import sys

from . import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: collections.Counter = collections.Counter()
    for seed in range(options.seed, options.seed + options.cases):
        result = run.run(seed)
        counts["fragile" if result.fragile else "failed" if result.failure else "passed"] += 1
        if result.failure:
            print(f"make fuzz CASES=1 SEED={seed}: {result.name}: {result.failure}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
