"What the tests of fingerprints, files and artifacts share: another process, and any value."
import subprocess
import sys

from hypothesis import strategies as st


def python(code, *args):
    "Run `code` in a fresh interpreter."
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
values = st.recursive(scalars, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=4), s, max_size=4), max_leaves=12)


def typed(x):
    "A repr in which equal means: same types, same values, dict order aside."
    if isinstance(x, dict): return ("dict", tuple(sorted((typed(k), typed(v)) for k, v in x.items())))
    if isinstance(x, list): return ("list", tuple(map(typed, x)))
    return (type(x).__name__, repr(x))
