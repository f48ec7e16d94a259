"Rows to train on: text in windows, batches, and mistakes found with the row that has them."
import pytest
import torch

from adapters import FAST, loaded, some
from langneuron_mi.text.sources import load_corpus
from langneuron_mi.text.windows import pack
from langneuron_mi.tuning.neuron_lora import TuneConfig, TuningError
from langneuron_mi.tuning.rows import PadCollator, lm_dataset, pad_rows
from langneuron_mi.tuning.training import tune


def test_tuning_lm_dataset_is_the_windows_text(tmp_path):
    model = loaded("llama")
    tok, texts = model.tokenizer, {"en": ["one two three four five six seven"]*4}
    data = lm_dataset(texts, tok, "eng_Latn", tokens=40, length=16)
    assert sum(len(r["input_ids"]) for r in data) == 40 + len(data)
    assert all(r["input_ids"][0] == tok.bos_token_id and r["labels"] == [-100] + r["input_ids"][1:] for r in data)
    windows = pack(load_corpus(texts), tok, tokens=40, length=16, bos_token_id=tok.bos_token_id)
    assert [r["input_ids"] for r in lm_dataset(windows, tok, "en")] == [r["input_ids"] for r in data]
    assert len(data.seen["en"])


def test_pad_rows_labels_of_pads_count_nowhere():
    batch = pad_rows([dict(input_ids=[1, 2, 3], labels=[-100, 2, 3]), dict(input_ids=[4], labels=[4])], 0)
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]] and batch["attention_mask"].sum() == 4
    with pytest.raises(ValueError, match="has no pad token; set"): pad_rows([dict(input_ids=[1])], None)
    with pytest.raises(ValueError, match="'left' or 'right'"): pad_rows([dict(input_ids=[1])], 0, "middle")


def test_pad_rows_on_either_side_takes_lists_tensors_and_masks_of_their_own():
    rows = [dict(input_ids=torch.tensor([1, 2, 3]), labels=1), dict(input_ids=[4], attention_mask=[0], labels=torch.tensor(2))]
    left, right = pad_rows(rows, 9, "left"), PadCollator(9)(rows)
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]] and right["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert left["attention_mask"].tolist() == right["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert left["labels"].tolist() == [1, 2] and {t.dtype for t in left.values()} == {torch.int64}


@pytest.mark.parametrize("bad, kwargs, message", [
    (dict(labels=[5, 6, 99999]), {}, "row 1 of the dataset has the label 99999; allowed are 0 to"),
    (dict(labels=[5, -1, 6]), {}, "label -1; allowed"),
    (dict(labels=[5]), {}, "labels of shape"),
    (dict(input_ids=[5, 99999, 6]), {}, "was another tokenizer used"),
    (dict(labels=3), dict(task_type="classification", num_labels=3), "row 1 of the dataset has the label 3; allowed are 0 to 2"),
    (dict(labels=[0, 1]), dict(task_type="classification", num_labels=3), "one class per row"),
    (dict(input_ids=[5, 6], labels=[5, 6]), dict(no_pad=True), "no pad token"),
    (dict(labels=0), dict(task_type="classification", num_labels=3, no_pad=True), "no pad token"),
    (dict(input_ids=[5, 6, 0], labels=0), dict(task_type="classification", num_labels=3), "row 1 of the dataset ends in the pad token 0"),
    (dict(), dict(task_type="classification"), "num_labels"),
    (dict(), dict(task_type="regression"), "no task_type"),
])
def test_tuning_errors_of_the_data(bad, kwargs, message, tmp_path):
    model = loaded("llama")
    if kwargs.pop("no_pad", False): model.tokenizer.pad_token = None
    good = dict(input_ids=[5, 6, 7], labels=0 if kwargs.get("num_labels") else [5, 6, 7])
    with pytest.raises(TuningError, match=message): tune(model, [good, good | bad], some(model), TuneConfig(**FAST), out=tmp_path, **kwargs)
    assert not list(tmp_path.iterdir())
