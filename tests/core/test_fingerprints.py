"Fingerprints in other processes and over all inputs, and provenance."
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anything import python, typed, values
from hypothesis import given, settings
from hypothesis import strategies as st

from langneuron_mi.core.fingerprints import fingerprint, provenance


@given(values, values)
@settings(max_examples=300, deadline=None)
def test_fingerprint_equal_iff_content_equal(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (repr(typed(a)) == repr(typed(b)))


@given(st.dictionaries(st.text(max_size=4), values, max_size=5))
@settings(max_examples=100, deadline=None)
def test_fingerprint_ignores_dict_order(d):
    assert fingerprint(d) == fingerprint(dict(reversed(d.items())))


def test_fingerprint_same_in_another_process():
    x = dict(site="gate", lam=.2, langs=["de", "ar"], n=3, none=None)
    code = "import json,sys; from langneuron_mi.core.fingerprints import fingerprint; print(fingerprint(json.loads(sys.argv[1])))"
    assert python(code, json.dumps(x)).stdout.strip() == fingerprint(x)


def test_fingerprint_types_differ():
    distinct = [1, "1", True, 1.0, b"1", [1], [[1]], {"1": 1}, {1: 1}, None, "", [], {}, 0, 0.0, -0.0, False, "None",
                np.array([1]), np.array([1], "int32"), torch.tensor([1]), torch.tensor([[1]]), torch.tensor(1), torch.tensor([True])]
    assert len({fingerprint(x) for x in distinct}) == len(distinct)
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint(["a", "b"])


def test_fingerprint_numpy():
    a = np.arange(12.).reshape(3, 4)
    assert fingerprint(a[:, ::2]) == fingerprint(a[:, ::2].copy()) == fingerprint(np.asfortranarray(a[:, ::2]))
    assert fingerprint(a) == fingerprint(a.astype(">f8"))
    assert fingerprint(np.int64(3), np.float64(.5), np.bool_(True)) == fingerprint(3, .5, True)
    fingerprint(np.zeros((0, 3))), fingerprint(np.array(1.)), fingerprint(np.array(["de", "ar"]))
    with pytest.raises(TypeError, match="objects"): fingerprint(np.array([{}], dtype=object))


@pytest.mark.parametrize("x", [{1, 2}, Path("a"), object(), lambda: 0, 1j])
def test_fingerprint_unknown_type(x):
    with pytest.raises(TypeError, match="cannot fingerprint a"): fingerprint([x])


def test_provenance(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/.venv/bin/langneuron", "record", "--seed", "0"])
    p = provenance(model="m")
    assert p["command"] == ["langneuron", "record", "--seed", "0"] and p["packages"]["torch"] and p["model"] == "m"
    assert p == provenance(model="m") and json.loads(json.dumps(p)) == p
    with pytest.raises(ValueError, match="packages"): provenance(packages=[])
