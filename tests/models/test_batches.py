"Batch sizes: what memory allows, and the smallest that is nearly the fastest."
import torch

from langneuron_mi.models.attention import attend
from langneuron_mi.models.batches import batch_sizes, fastest, free_bytes, window_bytes
from langneuron_mi.models.loading import load_model
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model


def test_batches_fastest_and_memory():
    assert fastest({1: 1., 2: 1.9, 4: 3., 8: 3.05}.get, [1, 2, 4, 8]) == 4
    assert fastest({1: 5., 2: 1.}.get, [1, 2]) == 1
    assert fastest({1: 1., 2: 9.}.get, [1, 2], seconds=0.) == 1, "no time for the second"
    def crowded(size):
        if size > 2: raise torch.OutOfMemoryError("full")
        return float(size)
    assert fastest(crowded, [1, 2, 4, 8]) == 2
    hf, tok = tiny_model("llama")
    v = view(load_model(hf, tokenizer=tok))
    one = window_bytes(v, 64)
    assert batch_sizes(v, 64, 16, memory=0) == [1]
    assert batch_sizes(v, 64, 16, memory=5 * one) == [1, 2, 4]
    assert batch_sizes(v, 64, 3, memory=99 * one) == [1, 2]
    assert window_bytes(v, 128) > 2 * one, "the table of positions grows with the square"
    attend(v, "sdpa")
    assert window_bytes(v, 128) < 2 * one + 1 and free_bytes(torch.device("cpu")) > 2**20
