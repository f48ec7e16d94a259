"Find, ablate and amplify language-specific neurons in multilingual language models."
__version__ = "0.1.0"

from importlib import import_module

_names = {
    "languages": ["language", "languages"],
    "corpora": ["Corpus", "load_corpus"],
    "models": ["load_model", "view"],
    "activation_stats": ["ActivationStats"],
    "speed": ["attend", "measure_speed"],
    "recording": ["cache_activations", "record"],
    "neurons": ["LanguageNeurons", "NeuronSet"],
    "identification": ["activation_probability", "average_precision", "lambda_score", "language_activated", "lape", "plnd", "random_neurons"],
    "interventions": ["Intervention", "ablate", "add", "amplify", "set_to", "steer"],
    "perplexity": ["PerplexityMatrix", "perplexity_matrix"],
    "generation": ["generate_texts"],
    "probes": ["load_probes"],
    "steering": ["Steering", "lss"],
    "tasks": ["TaskResults", "evaluate"],
    "task_matrix": ["TaskMatrix", "evaluate_matrix"],
    "cluster": ["RayEngine", "Recipe"],
    "sharing": ["Sharing", "category_effect", "sharing"],
    "attribution": ["category_contribution", "contribution", "effective_score", "gradient_x_activation", "integrated_gradients"],
    "neuron_lora": ["TuneConfig"],
    "tuning": ["Tuned", "lm_dataset", "tune"],
    "translation": ["load_pairs", "translate"],
    "translation_matrix": ["translation_table"],
    "comparison": ["Experiment", "read_experiment"],
    "sharing_study": ["SharingStudy"],
    "cards": ["browse", "neuron_card", "neuron_cards", "neuron_table"],
    "amplification": ["AmplificationStudy"],
    "transfer": ["TransferStudy"],
    "report": ["write_report"],
    "testing": ["planted_model"],
}
_where = {name: module for module, names in _names.items() for name in names}
__all__ = sorted(_where)

def __getattr__(name: str):
    "Names are imported when first used: `langneuron --help` must not wait for torch."
    if name not in _where: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_where[name]}"), name)

def __dir__(): return __all__
