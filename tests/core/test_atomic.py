"Files: crashes, real full disks, other processes."
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from anything import python

from langneuron_mi.core.atomic import ArtifactError, atomic_write, load_json, save_json
from langneuron_mi.core.artifacts import save_artifact


def temps(folder): return [p for p in Path(folder).iterdir() if ".tmp" in p.name]


def test_files_atomic_crash_keeps_the_old_file(tmp_path):
    target = tmp_path/"stats.bin"
    target.write_bytes(b"old")
    crash = python("""
import os, sys
from langneuron_mi.core.atomic import atomic_write
with atomic_write(sys.argv[1]) as tmp:
    tmp.write_bytes(b'half')
    os._exit(9)""", target)
    assert crash.returncode == 9, crash.stderr
    assert target.read_bytes() == b"old" and len(temps(tmp_path)) == 1
    with atomic_write(target) as tmp:
        assert temps(tmp_path) == []  # swept
        assert str(os.getpid()) in tmp.name and tmp.parent == tmp_path and tmp.suffix == ".bin"
        tmp.write_bytes(b"new")
    assert target.read_bytes() == b"new" and temps(tmp_path) == []


def test_files_atomic_leaves_others_alone(tmp_path):
    target = tmp_path/"a.bin"
    with atomic_write(target) as one, atomic_write(target) as two:  # as two threads would
        one.write_bytes(b"1"), two.write_bytes(b"2")
    host = socket.gethostname()
    foreign = [tmp_path/f".a~{host}~{os.getppid()}~x.tmp.bin", tmp_path/".a~other~99999999~x.tmp.bin",
               tmp_path/f".ab~{host}~99999999~x.tmp.bin", tmp_path/f".a~{host}~word~x.tmp.bin", tmp_path/".a~x.tmp.bin"]
    for f in foreign: f.write_bytes(b"")
    old = tmp_path/".a~other~7~x.tmp.bin"
    old.write_bytes(b""), os.utime(old, (0, 0))
    with atomic_write(target) as tmp: tmp.write_bytes(b"3")
    assert sorted(temps(tmp_path)) == sorted(foreign) and target.read_bytes() == b"3"


def test_files_atomic_real_write_error(tmp_path):
    "The kernel itself refuses to let the file grow, as a full disk does."
    target = tmp_path/"big.safetensors"
    save_artifact(target, "x", {"a": torch.ones(3)}, {})
    old = target.read_bytes()
    code = """
import resource, signal, sys, torch
from langneuron_mi.core.atomic import ArtifactError, atomic_write
from langneuron_mi.core.artifacts import save_artifact
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
def plain():
    with atomic_write(sys.argv[1]) as tmp: tmp.write_bytes(bytes(10**5))
for f in plain, lambda: save_artifact(sys.argv[1], 'x', {'a': torch.ones(10**5)}, {}):
    try: f()
    except ArtifactError as e: print(type(e.__cause__).__name__, e)
"""
    run = python(code, target)
    lines = run.stdout.splitlines()
    assert len(lines) == 2, run.stderr
    assert all("cannot write" in x and "too large" in x and "finished work is kept" in x for x in lines)
    assert lines[0].startswith("OSError")
    assert target.read_bytes() == old and temps(tmp_path) == []


def test_files_atomic_disk_full_at_sync(tmp_path, monkeypatch):
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="cannot write .*No space left on device; free some space") as e:
        with atomic_write(tmp_path/"a.txt") as tmp: tmp.write_text("x")
    assert isinstance(e.value.__cause__, OSError) and list(tmp_path.iterdir()) == []


def test_files_atomic_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic_write(tmp_path/"a.txt"): open(tmp_path/"input-that-is-missing")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path/"a.txt") as tmp:
            tmp.write_text("x")
            raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match="nothing was written"):
        with atomic_write(tmp_path/"a.txt"): pass
    assert list(tmp_path.iterdir()) == []


def test_files_atomic_target_is_folder_or_link(tmp_path):
    (tmp_path/"d").mkdir()
    with pytest.raises(ArtifactError, match="cannot write"):
        with atomic_write(tmp_path/"d") as tmp: tmp.write_text("x")
    real, link = tmp_path/"d"/"real.txt", tmp_path/"link.txt"
    real.write_text("old"), link.symlink_to(real)
    with atomic_write(link) as tmp: tmp.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"


def test_files_json(tmp_path):
    p = save_json(tmp_path/"a"/"b.json", {"b": 1, "a": "ü", "p": Path("x")})
    assert p.read_text(encoding="utf-8").index('"a"') < p.read_text(encoding="utf-8").index('"b"') and load_json(p)["a"] == "ü"
    p.write_text("{")
    with pytest.raises(ArtifactError, match="no valid JSON"): load_json(p)
    with pytest.raises(ArtifactError, match="no file"): load_json(tmp_path/"none.json")
