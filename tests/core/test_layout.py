"Layouts against lists of neurons written out."
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layouts import layouts, neurons

from langneuron_mi.core.layout import KINDS, Layout, Parts, from_json, layout_of, uniform

fast = settings(max_examples=50, deadline=None, derandomize=True)


@fast
@given(layouts())
def test_layout_places_and_neurons_are_one_to_one(layout):
    for layer, neuron, part, index in neurons(layout):
        assert layout.place(layer, neuron) == (part, index) and layout.neuron(layer, part, index) == neuron
    assert len(neurons(layout)) == layout.size == sum(layout.widths)
    assert layout.real.nonzero().tolist() == [[layer, neuron] for layer, neuron, *_ in neurons(layout)]
    assert layout.ragged == (not layout.real.all())


@fast
@given(layouts())
def test_layout_spans_share_out_each_layer(layout):
    for layer in range(layout.n_layers):
        covered = [i for kind in KINDS for i in range(*layout.span(layer, kind).indices(layout.width))]
        assert sorted(covered) == list(range(layout.widths[layer]))
        for kind in KINDS:
            here = [n for l, n, part, _ in neurons(layout) if l == layer and part.split()[0].rstrip("s") == kind.rstrip("s")]
            part, span = layout.part(layer, kind), layout.span(layer, kind)
            assert list(range(span.start, span.stop)) == here and (part is None) == (not here)
            assert part is None or part.size == len(here)


@fast
@given(layouts(), st.integers(-2, 8), st.integers(-2, 40))
def test_layout_refuses_what_does_not_exist(layout, layer, neuron):
    if (layer, neuron) in {o[:2] for o in neurons(layout)}: return layout.check(layer, neuron)
    for ask in (layout.check, layout.place):
        with pytest.raises(ValueError, match=f"neuron \\({layer}, {neuron}\\) is outside this model"): ask(layer, neuron)
    if not 0 <= layer < layout.n_layers: return
    for part in ("mlp", "shared", "expert 0", "expert 99", "experts"):
        width = sum(o[0] == layer and o[2] == part for o in neurons(layout))
        with pytest.raises(ValueError, match="has no" if not width else "has neurons 0 to"): layout.neuron(layer, part, width)


@fast
@given(layouts())
def test_layout_survives_json(layout):
    again = from_json(json.loads(json.dumps(layout.to_json())), layout.shape)
    assert again == layout and hash(again) == hash(layout) and repr(again) == repr(layout)
    assert len(layout.to_json()["layers"]) <= layout.n_layers and layout_of(layout) is layout
    wrong = layout.n_layers, layout.width + 1
    with pytest.raises(ValueError, match="the layout says"): from_json(layout.to_json(), wrong)
    assert from_json(None, wrong) == uniform(*wrong) == layout_of(wrong) and uniform(*wrong).dense
    for broken in (
        {},
        dict(layers=[[1, [["mlp", 0, 1]]]], stacks=[]),
        dict(layers=[[1, [["attention", 3, 1]]]], stacks=[]),
        dict(layers=[1], stacks=[]),
    ):
        with pytest.raises(ValueError, match="record again"):
            from_json(broken, layout.shape)


@fast
@given(layouts())
def test_layout_of_experts_has_one_neuron_for_each(layout):
    names = [sorted({o[2] for o in neurons(layout) if o[0] == l and o[2].startswith("expert")}) for l in range(layout.n_layers)]
    units = layout.experts
    assert [sorted({units.place(l, e)[0] for e in range(units.widths[l])}) for l in range(layout.n_layers)] == names
    assert units.size == sum(map(len, names)) and layout.has_experts == (units.size > 0) and units.stacks == layout.stacks


@fast
@given(layouts())
def test_layout_is_dense_exactly_when_a_shape_says_everything(layout):
    if layout.dense: assert layout == uniform(*layout.shape) and not layout.ragged and not layout.stacks
    else: assert layout != uniform(*layout.shape)


def test_layout_names_layers_by_stack_and_describes_runs():
    layout = Layout(((Parts("mlp", 4),), (Parts("mlp", 4),), (Parts("mlp", 4),), ()), (("encoder", 2), ("decoder", 2)))
    assert [layout.layer_name(l) for l in range(4)] == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    assert repr(layout) == "Layout(encoder 0 to encoder 1: mlp 4; decoder 0: mlp 4; decoder 1: no MLP)"
    for bad, said in ((dict(layers=()), "one layer or more"), (dict(layers=((), ()), stacks=(("encoder", 1),)), "do not add up"),
                      (dict(layers=((Parts("mlp", 1), Parts("mlp", 2)),)), "may stand once")):
        with pytest.raises(ValueError, match=said): Layout(**bad)
    assert torch.equal(layout.real, torch.tensor([[True]*4]*3 + [[False]*4]))
