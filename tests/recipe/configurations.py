"""Configurations of mergekit over the adapters of the tests, by what they show, and those that are refused."""

from __future__ import annotations

_TWO = """\
models:
- model: base+adapter
  parameters: {{weight: {0}{2}}}
- model: base+other
  parameters: {{weight: {1}{2}}}
base_model: base
dtype: float32
"""


def _two(method: str, weights: tuple[float, float], own: str = "", shared: str = "") -> str:
    parameters = f"parameters: {{{shared}}}\n" if shared else ""
    return f"merge_method: {method}\n{_TWO.format(*weights, own)}{parameters}"


CONFIGURATIONS = {
    "linear with the base": """\
merge_method: linear
models:
- {model: base+adapter, parameters: {weight: 0.7}}
- {model: base+other, parameters: {weight: 0.5}}
- {model: base, parameters: {weight: 0.3}}
dtype: float32
""",
    "linear without normalize": _two("linear", (0.75, 0.25), shared="normalize: false").replace(
        "base_model: base\n", ""
    ),
    "task arithmetic": _two("task_arithmetic", (0.7, -0.4), shared="lambda: 1.3"),
    "ties": _two("ties", (0.7, 0.4), ", density: 0.6", "int8_mask: true"),
    "ties summed": _two("ties", (0.7, 0.4), shared="density: 0.3, normalize: false, lambda: 0.8"),
    "dare_ties of all": _two("dare_ties", (0.7, 0.4), shared="density: 1.0, normalize: true"),
    "dare_linear of all": _two("dare_linear", (0.7, 0.4), shared="density: 1.0, normalize: true"),
    "della of all": _two("della", (0.7, 0.4), shared="density: 1.0"),
    "dare_linear": _two("dare_linear", (0.7, 0.4), shared="density: 0.5"),
    "dare_ties": _two("dare_ties", (0.7, 0.4), shared="density: 0.5"),
    "della": _two("della", (0.7, 0.4), shared="density: 0.5, epsilon: 0.2"),
    "della_linear": _two("della_linear", (0.7, 0.4), shared="density: 0.5, epsilon: 0.2"),
}

_TIES = CONFIGURATIONS["ties"]
REFUSED = {
    "slices": (
        "merge_method: passthrough\nslices:\n- sources: [{model: base, layer_range: [0, 1]}]\n",
        "slices: layers of models are put together there, and recipes combine adapters",
    ),
    "another method": (_two("slerp", (1, 1)), "merge_method: slerp is not done with adapters; of mergekit's methods"),
    "a mistyped method": (_two("tise", (1, 1)), "did you mean ties?"),
    "a gradient": (_TIES.replace("weight: 0.7", "weight: [0, 1]"), "weight: values for layers or for names of tensors"),
    "a filter": (
        _TIES.replace("weight: 0.7", "weight: [{filter: mlp, value: 1}, {value: 0}]"),
        "weight: values for layers or for names of tensors",
    ),
    "densities that differ": (
        _TIES.replace("weight: 0.4, density: 0.6", "weight: 0.4, density: 0.5"),
        "density: 0.6, 0.5; combine has one for all adapters",
    ),
    "a parameter of another method": (
        CONFIGURATIONS["ties summed"].replace("lambda: 0.8", "epsilon: 0.1"), "epsilon: ties has no such parameter",
    ),
    "a parameter at the wrong place": (
        _TIES.replace("weight: 0.4,", "weight: 0.4, normalize: true,"), "normalize: it is one for all models",
    ),
    "a whole model": (_TIES.replace("base+other", "tuned"), "tuned is a whole model; adapters of base are combined"),
    "another base": (_TIES.replace("base+other", "tuned+other"), "tuned is another base"),
    "a base with an adapter": (
        _TIES.replace("base_model: base", "base_model: base+adapter"), "merge that into it first",
    ),
    "no base": (_TIES.replace("base_model: base\n", ""), "base_model: ties needs one"),
    "no adapter": (_two("linear", (1, 1)).replace("+adapter", "").replace("+other", ""), "none of them has an adapter"),
    "no weight": (_TIES.replace("weight: 0.7, ", ""), "weight: every model needs one"),
    "a sum that scales the base": (
        _two("linear", (1, 1), shared="normalize: false"), "makes 2 times the base, which no adapter does",
    ),
    "weights that cancel": (_two("linear", (1, -1)), "the weights add up to 0"),
    "a density of nothing": (_TIES.replace("density: 0.6", "density: 0"), "density: 0 keeps nothing"),
    "an epsilon that leaves the range": (
        CONFIGURATIONS["della"].replace("epsilon: 0.2", "epsilon: 0.5"), "epsilon: 0.5 ± 0.5 leaves the range",
    ),
    "another tokenizer": (_TIES + "tokenizer_source: union\n", "tokenizer_source: the base's tokenizer comes along"),
    "a chat template": (_TIES + "chat_template: chatml\n", "chat_template: there is no equal of it here"),
    "another dtype": (_TIES.replace("float32", "int64"), "dtype: int64 is none of bfloat16"),
    "another architecture": (
        _TIES.replace("base+other", "{model: base, lora: other, override_architecture: X}"),
        "override_architecture: there is no equal of it here",
    ),
}  # fmt: skip
