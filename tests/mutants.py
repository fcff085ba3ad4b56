"""Break the code in known ways; each break has to turn a test red (`make mutants`).

    python tests/mutants.py            all of them
    python tests/mutants.py teacher    those whose name contains "teacher"

The package and its tests are copied to a temporary folder, so the checkout is never touched. First every test named
below is run on the unbroken copy and has to be green. Exit code 1 if a mutant survives, if the text that it replaces is
no longer in the code, or if what goes red is not a test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.known_mutants import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("megad2v", "tests", "ds_configs", "launch", "tools", "pyproject.toml")
LIMIT_S = 600
TESTS_FAILED = 1  # pytest's exit code; 2 and above: nothing was tested


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """pytest on the copy: (exit code, or None after LIMIT_S seconds; what it printed)."""
    shared = os.environ.get("MEGAD2V_SHARED") or str(REPOSITORY.parent / "shared")
    # PYTHONPATH wins over an editable install of the checkout, in the processes that tests start too. Without bytecode
    # files nobody can meet those of the mutant before: their check is by size and second.
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "MEGAD2V_SHARED": shared}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return None, f"no end after {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def try_mutant(mutant: Mutant, root: Path) -> tuple[bool, str]:
    """(caught?, what to show) of one mutant on the copy, which is left as it was."""
    path = root / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return False, f"the text to replace is there {source.count(mutant.old)} times: update tests/mutants.py"
    mutated = source.replace(mutant.old, mutant.new)
    compile(mutated, mutant.file, "exec")
    path.write_text(mutated)
    try:
        code, output = run_tests(root, [mutant.test])
    finally:
        path.write_text(source)
    if code == TESTS_FAILED:
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
        return True, failed[0].rpartition("/")[2] if failed else "?"
    if code == 0:
        return False, f"SURVIVES {mutant.test}"
    return False, f"pytest ended with {code} instead of a failed test:\n{output[-2000:]}"


def copy_checkout(root: Path) -> None:
    """The package and its tests, without caches."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, root / name)


def main(words: Sequence[str]) -> int:
    """Try the mutants whose names contain one of `words` (all without words); 0 when every one was caught."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not chosen:
        print(f"no mutant is called {' or '.join(words)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="megad2v-mutants-") as folder:
        root = Path(folder).resolve()
        copy_checkout(root)
        began = time.monotonic()
        code, output = run_tests(root, sorted({mutant.test for mutant in chosen}))
        print(f"{'unbroken':54} {'green' if code == 0 else 'RED':8} {time.monotonic() - began:5.0f} s", flush=True)
        if code != 0:
            print(output)
            return 1
        survivors = 0
        for mutant in chosen:
            began = time.monotonic()
            caught, shown = try_mutant(mutant, root)
            survivors += not caught
            verdict = "caught" if caught else "MISSED"
            print(f"{mutant.name:54} {verdict:8} {time.monotonic() - began:5.0f} s  {shown}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
