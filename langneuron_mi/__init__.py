"Find, ablate and amplify language-specific neurons in multilingual language models."
__version__ = "0.1.0"

from importlib import import_module

from .core.settings import engines  # what a word for an engine means: the door alone knows all of them

_names = {
    "text.languages": ["language", "languages"],
    "text.corpus": ["Corpus"],
    "text.sources": ["load_corpus"],
    "models.loading": ["load_model"],
    "models.view": ["view"],
    "recording.stats": ["ActivationStats"],
    "models.attention": ["attend"],
    "recording.speed": ["measure_speed"],
    "recording.tokens": ["cache_activations"],
    "recording.record": ["Recording", "record"],
    "find.language_neurons": ["LanguageNeurons"],
    "find.neurons": ["NeuronSet"],
    "find.methods": ["activation_probability", "average_precision", "language_activated", "plnd"],
    "find.identification": ["lambda_score", "lape"],
    "find.controls": ["random_neurons"],
    "find.experts": ["experts_of", "routing_divergence", "routing_table"],
    "change.interventions": ["Intervention", "ablate", "add", "amplify", "set_to", "steer"],
    "measure.perplexity": ["Measured", "PerplexityMatrix", "perplexity_matrix"],
    "change.generation": ["generate_texts"],
    "measure.probe_sources": ["load_probes"],
    "measure.steering_result": ["Steering"],
    "measure.steering": ["lss"],
    "measure.tasks": ["TaskResults", "evaluate"],
    "measure.task_matrix": ["TaskMatrix", "evaluate_matrix"],
    "scale.ray": ["RayEngine"],
    "scale.recipes": ["Recipe"],
    "share.sharing": ["Sharing", "sharing"],
    "share.effect": ["category_effect"],
    "share.contributions": ["category_contribution"],
    "share.attribution": ["contribution", "effective_score", "gradient_x_activation", "integrated_gradients"],
    "tuning.neuron_lora": ["TuneConfig"],
    "tuning.tuned": ["Tuned"],
    "tuning.rows": ["lm_dataset"],
    "tuning.training": ["tune"],
    "measure.pairs": ["load_pairs"],
    "measure.translation": ["translate"],
    "measure.translation_matrix": ["translation_table"],
    "studies.comparison": ["Experiment", "read_experiment"],
    "studies.sharing_study": ["SharingStudy"],
    "show.cards": ["browse", "neuron_card", "neuron_cards", "neuron_table"],
    "studies.amplification": ["AmplificationStudy"],
    "studies.transfer": ["TransferStudy"],
    "studies.comparison_report": ["write_report"],
    "testing.families": ["families_text", "model_families"],
    "testing.planted": ["planted_model"],
}
_where = {name: module for module, names in _names.items() for name in names}
__all__ = sorted(_where)

def __getattr__(name: str):
    "Names are imported when first used: `langneuron --help` must not wait for torch."
    if name not in _where: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_where[name]}"), name)

def __dir__(): return __all__

engines["ray"] = lambda: __getattr__("RayEngine")()
