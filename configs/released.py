"""Published facts about the released NLA pairs that their files do not carry. Data only.

`injection_scale` is the norm at which the AV was trained to be given vectors, `variance_nrm` the fve_nrm denominator
Var(v_n) of the pair's training set and `fve_nrm` the value on its model card (kitft/natural_language_autoencoders).
A pair is recognised by width, layer and marker id together.
"""

RELEASED = (
    {
        "name": "Qwen2.5-7B-Instruct L20",
        "target": "Qwen/Qwen2.5-7B-Instruct",
        "av": "kitft/nla-qwen2.5-7b-L20-av",
        "ar": "kitft/nla-qwen2.5-7b-L20-ar",
        "d_model": 3584,
        "layer_index": 20,
        "n_layers": 28,
        "marker_id": 149705,
        "injection_scale": 150.0,
        "variance_nrm": 0.7335,
        "fve_nrm": 0.752,
    },
    {
        "name": "Gemma-3-12B-IT L32",
        "target": "google/gemma-3-12b-it",
        "av": "kitft/nla-gemma3-12b-L32-av",
        "ar": "kitft/nla-gemma3-12b-L32-ar",
        "d_model": 3840,
        "layer_index": 32,
        "n_layers": 48,
        "marker_id": 246566,
        "injection_scale": 80000.0,
        "variance_nrm": 0.0302,
        "fve_nrm": 0.768,
    },
    {
        "name": "Gemma-3-27B-IT L41",
        "target": "google/gemma-3-27b-it",
        "av": "kitft/nla-gemma3-27b-L41-av",
        "ar": "kitft/nla-gemma3-27b-L41-ar",
        "d_model": 5376,
        "layer_index": 41,
        "n_layers": 62,
        "marker_id": 246566,
        "injection_scale": 60000.0,
        "variance_nrm": 0.0579,
        "fve_nrm": 0.763,
    },
    {
        "name": "Llama-3.3-70B-Instruct L53",
        "target": "meta-llama/Llama-3.3-70B-Instruct",
        "av": None,
        "ar": None,
        "d_model": 8192,
        "layer_index": 53,
        "n_layers": 80,
        "marker_id": 105565,
        "injection_scale": 30.0,
        "variance_nrm": 0.9169,
        "fve_nrm": 0.80,
    },
)


def published(d_model: int, layer_index: int | None, marker_id: int) -> dict | None:
    """The released pair with this width, layer and marker id, or None."""
    for pair in RELEASED:
        if (pair["d_model"], pair["layer_index"], pair["marker_id"]) == (d_model, layer_index, marker_id):
            return pair
    return None
