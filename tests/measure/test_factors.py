"The value that each factor's name means."
import torch

from langneuron_mi.change.interventions import Current
from langneuron_mi.measure.factors import factor


def test_factors_by_name(study):
    p, model, probes, stats, own, held = study
    n = own["de"]
    for name, kind in dict(p_max="p_max", p_median="p_median", p_90="p_90", mean="mean", p90="p90", median="median").items():
        assert torch.equal(factor(name, stats)(n, "de").edits[0].value, stats.value("de", kind).values[n.mask()].double())
    others = torch.stack([stats.value(l, "mean").values for l in ("en", "fr")]).mean(0)
    assert torch.equal(factor("+diff", stats)(n, "de").edits[0].value, (stats.value("de", "mean").values - others)[n.mask()])
    assert torch.equal(factor("+2mean", stats)(n, "de").edits[0].value, 2*stats.value("de", "mean").values[n.mask()])
    assert factor("set10p")(n, "de").edits[0].current == Current("quantile", .1)
    assert factor("=-1.5")(n, "de").edits[0].value.unique().tolist() == [-1.5]
