"Files that others publish, read without running what is in them."
import io
import os
import pathlib
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from langneuron_mi.recording.stats import ActivationStats
from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.find.identification import lape
from langneuron_mi.find.language_neurons import LanguageNeurons


def test_published_rucaibox_round_trip_and_errors(tmp_path):
    g = torch.Generator().manual_seed(0)
    lists = [[torch.randperm(11008, generator=g)[:int(n)].sort().values for n in torch.randint(0, 5, (32,), generator=g)] for _ in range(6)]
    torch.save(lists, tmp_path/"a.pth")
    langs = ["en", "zh", "fr", "es", "vi", "id"]
    found = LanguageNeurons.from_rucaibox(tmp_path/"a.pth", langs=langs, shape=(32, 11008))
    back = torch.load(found.to_rucaibox(tmp_path/"b.pth"), weights_only=True)
    assert all(torch.equal(x, y) for a, b in zip(lists, back) for x, y in zip(a, b)) and [len(b) for b in back] == [32]*6
    for names, shape, says in (([*langs, "ja"], (32, 11008), "holds 6 languages, and 7 names"),
                               (langs, (40, 11008), "32 layers, the model 40"), (langs, (32, 100), "outside this model")):
        with pytest.raises(ArtifactError, match=says): LanguageNeurons.from_rucaibox(tmp_path/"a.pth", langs=names, shape=shape)


class Evil:
    def __reduce__(self): return os.system, (f"touch {os.environ['EVIL']}",)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path/"broken-into"))
    yield tmp_path/"broken-into"
    assert not (tmp_path/"broken-into").exists()


def test_published_malicious_files_run_nothing(tmp_path, trap):
    inner = io.BytesIO()
    torch.save(Evil(), inner)
    class Hidden:  # a tensor's bytes that hold a pickle of their own
        def __reduce__(self): return torch.storage._load_from_bytes, (inner.getvalue(),)
    evil = dict(plain=Evil(), inside=dict(lang_to_neuron={"en": Evil()}), hidden=dict(lang_to_neuron={"en": Hidden()}))
    files = {k: pickle.dumps(x) for k, x in evil.items()}
    files["eval"] = b"cbuiltins\neval\n(S'open(\"" + str(trap).encode() + b"\",\"w\")'\ntR."
    for name, data in files.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ArtifactError): LanguageNeurons.from_lsn(tmp_path/name)
    torch.save([[Evil()]], tmp_path/"c.pth")
    with pytest.raises(ArtifactError, match="can run code"): LanguageNeurons.from_rucaibox(tmp_path/"c.pth", ["en"], (1, 4))
    torch.save(dict(n=3, over_zero=Evil()), tmp_path/"d")
    with pytest.raises(ArtifactError, match="can run code"): ActivationStats.from_rucaibox({"en": tmp_path/"d"})


def test_published_lsn(tmp_path):
    content = dict(device=torch.device("cpu"), model_name="meta-llama/Meta-Llama-3.1-8B", lang_list=["en", "vi"], method="act_prob_90p",
                   cwd=pathlib.Path("/home/x"), lang_neuron_path=pathlib.PosixPath("/home/x/a.pkl"), quant_config=None, L=4, int_d=16, m=2,
                   lang_to_neuron={"en": torch.tensor([[3, 15], [0, 2]]), "vi": torch.tensor([[1, 1], [1, 2]])})
    (tmp_path/"a.pkl").write_bytes(pickle.dumps(content))
    found = LanguageNeurons.from_lsn(tmp_path/"a.pkl")
    assert {k: list(v) for k, v in found.items()} == {"en": [(0, 2), (3, 15)], "vi": [(1, 1), (1, 2)]} and found.shape == (4, 16)
    assert found.method == "lsn/act_prob_90p" and found.provenance["model_id"].endswith("8B")
    (tmp_path/"np.pkl").write_bytes(pickle.dumps(OrderedDict(lang_to_neuron={"en": np.array([[0, 1]])})))
    assert list(LanguageNeurons.from_lsn(tmp_path/"np.pkl", shape=(1, 4))["en"]) == [(0, 1)]
    with pytest.raises(ArtifactError, match="give shape="): LanguageNeurons.from_lsn(tmp_path/"np.pkl")
    with pytest.raises(ArtifactError, match="4 layers x 16, not"): LanguageNeurons.from_lsn(tmp_path/"a.pkl", shape=(32, 16))
    (tmp_path/"far.pkl").write_bytes(pickle.dumps(content | dict(int_d=8)))
    with pytest.raises(ArtifactError, match="outside this model"): LanguageNeurons.from_lsn(tmp_path/"far.pkl")
    (tmp_path/"cut.pkl").write_bytes((tmp_path/"a.pkl").read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="damaged"): LanguageNeurons.from_lsn(tmp_path/"cut.pkl")
    (tmp_path/"other.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ArtifactError, match="lang_to_neuron"): LanguageNeurons.from_lsn(tmp_path/"other.pkl")


def test_published_activation_counts(tmp_path):
    c = torch.randint(0, 50, (2, 3, 8))
    torch.save(dict(n=50, over_zero=c[0].int()), tmp_path/"activation.en.train.llama")
    torch.save(dict(total_tokens=60, over_zero=c[1]), tmp_path/"activation.de.Mistral.pt")
    en, de = tmp_path/"activation.en.train.llama", tmp_path/"activation.de.Mistral.pt"
    s = ActivationStats.from_rucaibox({"en": en, "de": de}, model_id="Mistral")
    assert torch.equal(s.count_pos, c) and s.n_tokens == {"en": 50, "de": 60} and lape(s).langs == ("en", "de")
    torch.save(dict(n=50, over_zero=c[0, :2]), tmp_path/"other")
    with pytest.raises(ArtifactError, match="different models"): ActivationStats.from_rucaibox({"en": en, "de": tmp_path/"other"})
    torch.save(dict(n=5, over_zero=c[0] + 10), tmp_path/"few")
    with pytest.raises(ValueError, match="between 0 and the 5 tokens"): ActivationStats.from_rucaibox({"en": tmp_path/"few"})
    torch.save([c[0]], tmp_path/"list")
    with pytest.raises(ArtifactError, match="not an activation count file"): ActivationStats.from_rucaibox({"en": tmp_path/"list"})
    with pytest.raises(ArtifactError, match="no file"): ActivationStats.from_rucaibox({"en": tmp_path/"none"})
