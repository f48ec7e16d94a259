"Hooks that go away, and a model that is forgotten."
import pytest
import torch

from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model


def test_hooked_hooks_removed_after_error_and_others_kept():
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    mine = []
    point = v.point(0, "post")
    point.add_hook(lambda act, hook: mine.append(1))
    with pytest.raises(ZeroDivisionError):
        with v.hooks([(0, "post", lambda x: None), (1, "pre", lambda x: None)]):
            1 / 0
    assert len(point.fwd_hooks) == 1 and not v.point(1, "pre").fwd_hooks
    v.body(torch.tensor([[4, 5]]))
    assert mine == [1]


def test_hooked_are_freed():
    import gc
    import weakref
    hf, tok = tiny_model("llama")
    model = load_model(hf, tokenizer=tok)
    ref = weakref.ref(model)
    del model, hf
    gc.collect()
    assert ref() is None
