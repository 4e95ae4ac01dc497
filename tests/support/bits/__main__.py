"""Compare the bits of this tree with those of an earlier revision.

PYTHONPATH=tests python -m support.bits REVISION [--cases 4000] [--seed 0]
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]


def record_of(package: Path, options: argparse.Namespace) -> dict[str, str]:
    """Run `record` in a process that imports the package that lies beside a kernels/ folder."""
    with tempfile.TemporaryDirectory() as folder:
        # Through a link, for kernels/ beside it has the name of another package.
        (Path(folder) / "fastrlhf").symlink_to(package)
        code = (
            "import json, fastrlhf; from support.bits.record import record; "
            f"assert fastrlhf.__file__.startswith({folder!r}); "
            f"print(json.dumps(record({options.seed}, {options.cases})))"
        )
        paths = os.pathsep.join((folder, str(ROOT / "tests")))
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True,
            cwd=folder, env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Print each call that differs; the exit status is 1 if one does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="of git, with which this tree is compared")
    parser.add_argument("--cases", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", options.revision, "fastrlhf", "kernels"],
            cwd=ROOT, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tree:
            tree.extractall(folder, filter="tar")
        before = record_of(Path(folder) / "fastrlhf", options)
    after = record_of(ROOT / "fastrlhf", options)
    different = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    for name in different:
        print(f"{name}: {before.get(name)} before, {after.get(name)} now")
    errors = sum(":" in digest for digest in after.values())
    print(f"{len(after)} calls, {errors} of them errors, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
