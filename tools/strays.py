"""Exit 1 where a tracked file is a link out of the tree, or names a place of one machine.

Tests may name such places (they test what is done with them), and so may the files that tests read."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(?<![\w.:/~])/(?:tmp|home|root|Users|work|private|var/folders)/[\w.-]+|[A-Z]:\\+Users\\+\w+")


def tracked(root: Path = ROOT) -> list[Path]:
    "Files that git knows, and those that it would add."
    rows = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    return [root / name for name in rows.split("\0") if name and ((root / name).exists() or (root / name).is_symlink())]


def links_out(root: Path, files: list[Path]) -> list[str]:
    "Links that leave the tree, or name their goal from the root of a disk."
    return [
        str(f.relative_to(root))
        for f in files
        if f.is_symlink() and (f.readlink().is_absolute() or not f.resolve().is_relative_to(root.resolve()))
    ]


def places(root: Path, files: list[Path]) -> list[str]:
    "Lines with a path of one machine."
    found = []
    for f in files:
        if f.is_symlink() or f.relative_to(root).parts[0] == "tests": continue
        try: lines = f.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError: continue
        found += [f"{f.relative_to(root)}:{i}: {m[0]}" for i, line in enumerate(lines, 1) if (m := PLACE.search(line))]
    return found


def main() -> int:
    files = tracked()
    bad = [f"{name} is a link out of the tree" for name in links_out(ROOT, files)] + places(ROOT, files)
    for line in bad: print(line, file=sys.stderr)
    if bad: print("name places from the project's root; run a notebook again whose stored output names a temporary folder", file=sys.stderr)
    else: print(f"{len(files)} files: no link leaves the tree, and none names a place of one machine")
    return int(bool(bad))


if __name__ == "__main__": sys.exit(main())
