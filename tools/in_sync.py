"""Exit 1 unless modules, cleaned notebooks and README.md are what the notebooks make them; edits in the working tree do not matter.

Whatever is out of date is brought up to date on the way: look at it with `git diff`, then commit it."""
import sys
from hashlib import sha256
from pathlib import Path

from nbdev.clean import nbdev_clean
from nbdev.export import nb_export  # noqa: F401  (fails early where nbdev is broken)
from nbdev.doclinks import nbdev_export
from readme import write_readme

ROOT = Path(__file__).resolve().parent.parent


def hashes() -> dict[str, str]:
    "Content of every file that is made from notebooks, and of the notebooks."
    files = [*ROOT.glob("langneuron_mi/**/*.py"), *ROOT.glob("nbs/**/*.ipynb"), ROOT / "README.md"]
    return {
        str(f.relative_to(ROOT)): sha256(f.read_bytes()).hexdigest() for f in files if f.exists() and ".ipynb_checkpoints" not in f.parts
    }


def main() -> int:
    before, changed = hashes(), set()
    for step, run in [
        ("nbdev_export", nbdev_export.__wrapped__),
        ("nbdev_clean", nbdev_clean.__wrapped__),
        ("tools/readme.py", write_readme),
    ]:
        run()
        after = hashes()
        for f in sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f)):
            print(f"{f} was not in sync with the notebooks ({step} changed it)", file=sys.stderr)
            changed.add(f)
        before = after
    if changed: print("commit the files named above; edit notebooks only, never langneuron_mi/*.py or README.md", file=sys.stderr)
    else: print(f"{len(before)} files in sync")
    return bool(changed)


if __name__ == "__main__": sys.exit(main())
