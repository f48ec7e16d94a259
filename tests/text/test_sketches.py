"Sketches against sets: what two of them share is exact below the size of a sketch, and a lower bound above it."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from langneuron_mi.text import sketches
from langneuron_mi.text.corpus import text_hash
from langneuron_mi.text.sketches import add_to_sketch, shares_text


@settings(deadline=None, max_examples=80)
@given(st.sets(st.integers(0, 300)), st.sets(st.integers(0, 300)), st.integers(4, 40))
def test_sketches_share_text_against_sets(a, b, k):
    def sketch(s):
        some = add_to_sketch(np.empty(0, np.uint64), [f" {i}" for i in sorted(s)[::2]])
        return add_to_sketch(some, [f"{i} " for i in sorted(s)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketches, "SKETCH", k)
        n, (ha, hb) = shares_text(sketch(a), sketch(b)), (sorted(text_hash(str(i)) for i in s) for s in (a, b))
    bound = min([h[k - 1] for h in (ha, hb) if len(h) >= k], default=2**64)
    assert n == len({h for h in ha if h <= bound} & {h for h in hb if h <= bound}) <= len(a & b)
    if max(len(a), len(b)) < k: assert n == len(a & b)


def test_sketches_share_text_of_signed_copies():
    s = add_to_sketch(np.empty(0, np.uint64), map(str, range(500)))
    assert shares_text(s, s.view(np.int64)) == 500
