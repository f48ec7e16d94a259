"Artifacts: other processes, and properties over all inputs."
import os
import sys

import pytest
import torch
from anything import python, typed, values
from hypothesis import given, settings
from hypothesis import strategies as st

from langneuron_mi.core.atomic import ArtifactError, atomic_write
from langneuron_mi.core.artifacts import load_artifact, read_header, save_artifact


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


def test_artifacts_a_file_of_another_kind_is_not_called_damaged(tmp_path):
    (tmp_path/"en.txt").write_text("A corpus, by no means to be deleted.")
    with pytest.raises(ArtifactError, match="is no safetensors file; give a file that this package wrote") as e:
        load_artifact(tmp_path/"en.txt", "x")
    assert "delete" not in str(e.value)


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
