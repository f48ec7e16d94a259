"What tuning gives: an ordinary adapter, saved and loaded, and a proof that can fail."
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import FAST, loaded, rows, same_adapter, some
from langneuron_mi.core.atomic import ArtifactError
from langneuron_mi.models.view import view
from langneuron_mi.testing.tiny import tiny_model
from langneuron_mi.tuning.neuron_lora import TuneConfig, TuningError
from langneuron_mi.tuning.training import tune
from langneuron_mi.tuning.tuned import Tuned


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("full_rank", [False, True])
def test_tuning_adapter_is_an_ordinary_peft_adapter(arch, full_rank, tmp_path):
    from peft import PeftModel
    model = loaded(arch)
    tuned = tune(model, rows(), some(model), TuneConfig(**FAST | dict(full_rank=full_rank)), out=tmp_path)
    ids = torch.tensor([[1, 6, 7, 8], [1, 9, 10, 11]])
    theirs = PeftModel.from_pretrained(tiny_model(arch)[0], str(tuned.adapter_dir)).eval()(ids).logits
    torch.testing.assert_close(tuned.merged()(ids).logits, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(view(tuned.hooked()).logits(ids), theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - tiny_model(arch)[0](ids).logits).abs().max() > 1e-2
    files = {p.name for p in tuned.adapter_dir.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "neurons.safetensors", "tuning.json", "log.csv"} <= files


def test_tuning_save_and_load(tmp_path):
    model = loaded("llama")
    tuned = tune(model, rows(), some(model), TuneConfig(**FAST), out=tmp_path/"run")
    copied = Tuned.load(tuned.save(tmp_path/"copy"), model)
    same_adapter(tuned, copied)
    assert copied.neurons == some(model) and copied.config == tuned.config and copied.count == tuned.count
    assert copied.log["loss"].tolist() == tuned.log["loss"].tolist()
    other = loaded("llama", num_key_value_heads=4)
    with pytest.raises(TuningError, match="fingerprint"): Tuned.load(tmp_path/"copy", other)
    with pytest.raises(TuningError, match="exists"): tuned.save(tmp_path/"copy")
    with pytest.raises(ArtifactError, match="no file"): Tuned.load(tmp_path/"nothing", model)


def test_tuning_check_finds_a_change_outside_the_mask(tmp_path):
    model = loaded("llama")
    tuned = tune(model, rows(), some(model), TuneConfig(**FAST | dict(attention=False)), out=tmp_path)
    path = tuned.adapter_dir/"adapter_model.safetensors"
    weights = load_file(path)
    name = next(k for k in weights if "down_proj.lora_A" in k)
    outside = next(i for i in range(64) if i not in some(model).neurons_in(0).tolist())
    weights[name][0, outside] = .1
    save_file(weights, path)
    with pytest.raises(TuningError, match="outside the mask"): Tuned.load(tmp_path, model).check()
