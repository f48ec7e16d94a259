"Artifacts: crashes, real full disks, other processes, and properties over all inputs."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langneuron_mi.core.files import ArtifactError, atomic_write, load_json, save_json
from langneuron_mi.core.fingerprints import fingerprint, provenance
from langneuron_mi.core.artifacts import load_artifact, read_header, save_artifact


def python(code, *args):
    "Run `code` in a fresh interpreter."
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


def temps(folder): return [p for p in Path(folder).iterdir() if ".tmp" in p.name]


# --- fingerprints ---

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
values = st.recursive(scalars, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=4), s, max_size=4), max_leaves=12)


def typed(x):
    "A repr in which equal means: same types, same values, dict order aside."
    if isinstance(x, dict): return ("dict", tuple(sorted((typed(k), typed(v)) for k, v in x.items())))
    if isinstance(x, list): return ("list", tuple(map(typed, x)))
    return (type(x).__name__, repr(x))


@given(values, values)
@settings(max_examples=300, deadline=None)
def test_artifacts_fingerprint_equal_iff_content_equal(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (repr(typed(a)) == repr(typed(b)))


@given(st.dictionaries(st.text(max_size=4), values, max_size=5))
@settings(max_examples=100, deadline=None)
def test_artifacts_fingerprint_ignores_dict_order(d):
    assert fingerprint(d) == fingerprint(dict(reversed(d.items())))


def test_artifacts_fingerprint_same_in_another_process():
    x = dict(site="gate", lam=.2, langs=["de", "ar"], n=3, none=None)
    code = "import json,sys; from langneuron_mi.core.fingerprints import fingerprint; print(fingerprint(json.loads(sys.argv[1])))"
    assert python(code, json.dumps(x)).stdout.strip() == fingerprint(x)


def test_artifacts_fingerprint_types_differ():
    distinct = [1, "1", True, 1.0, b"1", [1], [[1]], {"1": 1}, {1: 1}, None, "", [], {}, 0, 0.0, -0.0, False, "None",
                np.array([1]), np.array([1], "int32"), torch.tensor([1]), torch.tensor([[1]]), torch.tensor(1), torch.tensor([True])]
    assert len({fingerprint(x) for x in distinct}) == len(distinct)
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint(["a", "b"])


def test_artifacts_fingerprint_numpy():
    a = np.arange(12.).reshape(3, 4)
    assert fingerprint(a[:, ::2]) == fingerprint(a[:, ::2].copy()) == fingerprint(np.asfortranarray(a[:, ::2]))
    assert fingerprint(a) == fingerprint(a.astype(">f8"))
    assert fingerprint(np.int64(3), np.float64(.5), np.bool_(True)) == fingerprint(3, .5, True)
    fingerprint(np.zeros((0, 3))), fingerprint(np.array(1.)), fingerprint(np.array(["de", "ar"]))
    with pytest.raises(TypeError, match="objects"): fingerprint(np.array([{}], dtype=object))


@pytest.mark.parametrize("x", [{1, 2}, Path("a"), object(), lambda: 0, 1j])
def test_artifacts_fingerprint_unknown_type(x):
    with pytest.raises(TypeError, match="cannot fingerprint a"): fingerprint([x])


# --- atomic writes ---

def test_artifacts_atomic_crash_keeps_the_old_file(tmp_path):
    target = tmp_path/"stats.bin"
    target.write_bytes(b"old")
    crash = python("""
import os, sys
from langneuron_mi.core.files import atomic_write
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


def test_artifacts_atomic_leaves_others_alone(tmp_path):
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


def test_artifacts_atomic_real_write_error(tmp_path):
    "The kernel itself refuses to let the file grow, as a full disk does."
    target = tmp_path/"big.safetensors"
    save_artifact(target, "x", {"a": torch.ones(3)}, {})
    old = target.read_bytes()
    code = """
import resource, signal, sys, torch
from langneuron_mi.core.files import ArtifactError, atomic_write
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


def test_artifacts_atomic_disk_full_at_sync(tmp_path, monkeypatch):
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="cannot write .*No space left on device; free some space") as e:
        with atomic_write(tmp_path/"a.txt") as tmp: tmp.write_text("x")
    assert isinstance(e.value.__cause__, OSError) and list(tmp_path.iterdir()) == []


def test_artifacts_atomic_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic_write(tmp_path/"a.txt"): open(tmp_path/"input-that-is-missing")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path/"a.txt") as tmp:
            tmp.write_text("x")
            raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match="nothing was written"):
        with atomic_write(tmp_path/"a.txt"): pass
    assert list(tmp_path.iterdir()) == []


def test_artifacts_atomic_target_is_folder_or_link(tmp_path):
    (tmp_path/"d").mkdir()
    with pytest.raises(ArtifactError, match="cannot write"):
        with atomic_write(tmp_path/"d") as tmp: tmp.write_text("x")
    real, link = tmp_path/"d"/"real.txt", tmp_path/"link.txt"
    real.write_text("old"), link.symlink_to(real)
    with atomic_write(link) as tmp: tmp.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"


# --- artifacts ---

dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.uint64]
shapes = st.lists(st.integers(0, 3), max_size=3)


@given(st.dictionaries(st.text("abc.xé", min_size=1, max_size=4), st.tuples(shapes, st.sampled_from(dtypes)), max_size=4),
       st.dictionaries(st.text(max_size=4), values, max_size=3).filter(lambda d: "bytes" not in repr(typed(d))))
@settings(max_examples=60, deadline=None)
def test_artifacts_roundtrip(tmp_path_factory, spec, meta):
    folder = tmp_path_factory.mktemp("a")
    tensors = {k: torch.randint(0, 2, s).to(d) for k, (s, d) in spec.items()}
    path = save_artifact(folder/"a.safetensors", "x", tensors, meta)
    back, m = load_artifact(path, "x")
    assert m == meta and back.keys() == tensors.keys()
    assert all(back[k].dtype == t.dtype and back[k].shape == t.shape and torch.equal(back[k], t) for k, t in tensors.items())
    again = save_artifact(folder/"b.safetensors", "x", dict(reversed(tensors.items())), dict(reversed(meta.items())))
    assert again.read_bytes() == path.read_bytes()


def test_artifacts_same_bytes_in_another_process(tmp_path):
    code = """
import sys, torch
from langneuron_mi.core.artifacts import save_artifact
save_artifact(sys.argv[1], 'x', {'b': torch.arange(5), 'a': torch.ones(2, 2), 'c': torch.zeros(3, dtype=torch.bfloat16)},
              {'z': 1, 'y': [.1, None], 3: 'three', 20: 'twenty'})"""
    for name in "12": assert python(code, tmp_path/name).returncode == 0
    assert (tmp_path/"1").read_bytes() == (tmp_path/"2").read_bytes()
    assert load_artifact(tmp_path/"1", "x")[1]["20"] == "twenty"


def test_artifacts_no_changed_or_missing_byte_passes_unnoticed(tmp_path):
    good = save_artifact(tmp_path/"good", "x", {"a": torch.arange(4), "b": torch.ones(2, dtype=torch.bfloat16)}, {"lang": "de"})
    tensors, meta = load_artifact(good, "x")
    raw, bad = good.read_bytes(), tmp_path/"bad"
    for cut in range(len(raw)):
        bad.write_bytes(raw[:cut])
        with pytest.raises(ArtifactError): load_artifact(bad, "x")
    for i in range(len(raw)):
        for bit in (1, 0x20):
            bad.write_bytes(raw[:i] + bytes([raw[i] ^ bit]) + raw[i+1:])
            try: t, m = load_artifact(bad, "x")
            except ArtifactError: continue
            assert m == meta and t.keys() == tensors.keys()
            assert all(torch.equal(t[k], v) and t[k].dtype == v.dtype for k, v in tensors.items())


def test_artifacts_refusals(tmp_path):
    path = save_artifact(tmp_path/"a", "x", {}, {}, schema=2)
    assert load_artifact(path, "x", schema=2) == ({}, {})
    with pytest.raises(ArtifactError, match="newer"): load_artifact(path, "x")
    with pytest.raises(ArtifactError, match="older"): load_artifact(path, "x", schema=3)
    with pytest.raises(ArtifactError, match="'x', not 'y'"): load_artifact(path, "y")
    with pytest.raises(ArtifactError, match="no artifact at"): load_artifact(tmp_path, "x")
    from safetensors.torch import save_file
    save_file({"w": torch.ones(2)}, tmp_path/"weights")
    with pytest.raises(ArtifactError, match="no artifact of langneuron_mi"): load_artifact(tmp_path/"weights", "x")
    (tmp_path/"empty").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cut short"): load_artifact(tmp_path/"empty", "x")
    import pickle
    (tmp_path/"p.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ArtifactError, match="pickle"): load_artifact(tmp_path/"p.pkl", "x")
    assert read_header(path)["kind"] == "x"
    with pytest.raises(TypeError, match="cannot store a set"): save_artifact(path, "x", {}, {"a": {1}})
    assert load_artifact(path, "x", schema=2) == ({}, {})


def test_artifacts_shared_memory_is_stored_apart(tmp_path):
    big = torch.arange(10000.)
    path = save_artifact(tmp_path/"a", "x", {"head": big[:3], "tail": big[-2:], "all": big, "same": big}, {})
    back, _ = load_artifact(path, "x")
    assert torch.equal(back["tail"], big[-2:]) and torch.equal(back["same"], big) and path.stat().st_size < 2*4*10000 + 2000


def test_artifacts_json(tmp_path):
    p = save_json(tmp_path/"a"/"b.json", {"b": 1, "a": "ü", "p": Path("x")})
    assert p.read_text(encoding="utf-8").index('"a"') < p.read_text(encoding="utf-8").index('"b"') and load_json(p)["a"] == "ü"
    p.write_text("{")
    with pytest.raises(ArtifactError, match="no valid JSON"): load_json(p)
    with pytest.raises(ArtifactError, match="no file"): load_json(tmp_path/"none.json")


def test_artifacts_provenance(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/.venv/bin/langneuron", "record", "--seed", "0"])
    p = provenance(model="m")
    assert p["command"] == ["langneuron", "record", "--seed", "0"] and p["packages"]["torch"] and p["model"] == "m"
    assert p == provenance(model="m") and json.loads(json.dumps(p)) == p
    with pytest.raises(ValueError, match="packages"): provenance(packages=[])


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_artifacts_are_readable_as_the_umask_says(tmp_path):
    "safetensors alone writes files that only their owner may read: colleagues on a shared disk could not."
    old = os.umask(0o022)
    try:
        save_artifact(tmp_path/"a.safetensors", "x", {"t": torch.ones(2)}, {})
        (tmp_path/"a.safetensors").chmod(0o640)
        save_artifact(tmp_path/"a.safetensors", "x", {"t": torch.zeros(2)}, {})  # replaced: as it was
        save_artifact(tmp_path/"b.safetensors", "x", {"t": torch.ones(2)}, {})
        with atomic_write(tmp_path/"c.txt") as tmp: tmp.write_text("x")
    finally: os.umask(old)
    assert [f.stat().st_mode & 0o777 for f in sorted(tmp_path.iterdir())] == [0o640, 0o644, 0o644]


def test_artifacts_a_file_of_another_kind_is_not_called_damaged(tmp_path):
    (tmp_path/"en.txt").write_text("A corpus, by no means to be deleted.")
    with pytest.raises(ArtifactError, match="is no safetensors file; give a file that this package wrote") as e:
        load_artifact(tmp_path/"en.txt", "x")
    assert "delete" not in str(e.value)
