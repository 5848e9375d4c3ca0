"""What llama.cpp's converter makes of the weights of each architecture: one table, of names and of the order of rows.

Names are those of transformers' modules within a layer. The converter keeps every number of a weight; where it puts the
rows in another order, `rows` says in which (`llama_cpp.Order`). What it splits, turns round or adds to has its reason
in `refused`: no update lands there. An architecture that is not in the table is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PAIRS, GROUPS = "pairs", "groups"
"""Orders of rows: halves of a head in pairs; q, k and v of groups of heads (q…, k, v) one after the other."""

_ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_LLAMA = _ATTENTION | _MLP | _NORMS
_AFTER = _ATTENTION | _MLP | {
    "post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_GEMMA = _AFTER | {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm"}
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
_SHARED_EXPERTS = {name.replace("expert.", "experts."): tensor for name, tensor in _SHARED_EXPERT.items()}
_ROUTER = {"mlp.gate": "ffn_gate_inp"}
_H_TO_4H = {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
_GPT = {
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm", "ln_2": "ffn_norm",
}  # fmt: skip
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_MIXTRAL = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
_QK = {"attn_q": PAIRS, "attn_k": PAIRS}

_TIED = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_GPT2 = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output",
}  # fmt: skip
_OF_BLOOM = {"transformer.word_embeddings": "token_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}

_LINEAR_ATTENTION = {
    r"linear_attn\..+": "the converter puts q, k, v and gates of linear attention in another order, and some in others"
}
_ONE_ADDED = "the converter adds 1 to the weights of norms"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is known of one architecture.

    `models` are transformers' model types, `modules` the tensor of a block that each module within a layer becomes,
    `whole` the same outside of the layers, `experts` the stack that each projection of an expert under `home` becomes.
    `norms` says why no norm takes a tensor trained whole, where it does not. `blocks` has other kinds of layers:
    path -> (the tensors' prefix, modules).
    """

    models: tuple[str, ...]
    modules: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    rows: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    home: str = "mlp"
    layers: str = "model.layers"
    whole: Mapping[str, str] = field(default_factory=lambda: _WHOLE)
    refused: Mapping[str, str] = field(default_factory=dict)
    norms: str = ""
    blocks: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)

    def kinds_of_layers(self) -> Mapping[str, tuple[str, Mapping[str, str]]]:
        """Return the path of a stack of layers -> (the prefix of their tensors, modules)."""
        return self.blocks or {self.layers: ("blk", self.modules)}


_SHARED_LINEAR = {
    r"block_sparse_moe\.(input_linear|output_linear|experts.*)": "the converter splits stacks of fused experts",
    r"shared_mlp\.input_linear": "the converter splits it into gate and up",
}
_T5_BLOCK = {f"layer.0.SelfAttention.{name}": f"attn_{name}" for name in "qkvo"}


def _t5_feed_forward(layer: int) -> dict[str, str]:
    names = {"wi": "ffn_up", "wi_0": "ffn_gate", "wi_1": "ffn_up", "wo": "ffn_down"}
    return {f"layer.{layer}.DenseReluDense.{name}": tensor for name, tensor in names.items()}


TABLE: Mapping[str, Architecture] = {
    # transformers' Llama and its kin, whose rows of q and k are permuted
    "llama": Architecture(
        ("llama", "mistral", "mixtral"),
        _LLAMA | {"block_sparse_moe.gate": "ffn_gate_inp"} | _ROUTER, _QK, _MIXTRAL, "block_sparse_moe",
    ),
    "granite": Architecture(("granite",), rows=_QK),
    "granitemoe": Architecture(
        ("granitemoe", "granitemoeshared"),
        _ATTENTION | _NORMS
        | {"block_sparse_moe.router.layer": "ffn_gate_inp", "shared_mlp.output_linear": "ffn_down_shexp"},
        _QK, refused=_SHARED_LINEAR,
    ),
    "smollm3": Architecture(("smollm3",), rows=_QK),
    "arcee": Architecture(
        ("arcee",), _ATTENTION | _NORMS | {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}, _QK
    ),
    "olmo": Architecture(
        ("olmo",), _ATTENTION | _MLP, _QK, whole={"model.embed_tokens": "token_embd", "lm_head": "output"}
    ),
    "minicpm": Architecture(("minicpm",), rows=_QK),
    "mistral3": Architecture(("ministral3", "mistral3"), rows=_QK),
    "deepseek": Architecture(("deepseek",), _LLAMA | _ROUTER | _SHARED_EXPERTS, _QK, _EXPERTS),
    # rows in transformers' order
    "qwen2": Architecture(("qwen2",)),
    "qwen2vl": Architecture(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")),
    "qwen2moe": Architecture(
        ("qwen2_moe",),
        _ATTENTION | _NORMS | _ROUTER | _SHARED_EXPERT | {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
        experts=_EXPERTS,
    ),
    "qwen3": Architecture(("qwen3",), _LLAMA | _QK_NORMS),
    "qwen3vl": Architecture(("qwen3_vl", "qwen3_vl_text"), _LLAMA | _QK_NORMS),
    "qwen3moe": Architecture(("qwen3_moe",), _ATTENTION | _NORMS | _QK_NORMS | _ROUTER, experts=_EXPERTS),
    "qwen3vlmoe": Architecture(
        ("qwen3_vl_moe", "qwen3_vl_moe_text"), _ATTENTION | _NORMS | _QK_NORMS | _ROUTER, experts=_EXPERTS
    ),
    "qwen3next": Architecture(
        ("qwen3_next",),
        _ATTENTION | _ROUTER | _SHARED_EXPERT | {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
        experts=_EXPERTS, refused=_LINEAR_ATTENTION, norms=_ONE_ADDED,
    ),
    "seed_oss": Architecture(
        ("seed_oss",), _ATTENTION | _MLP
        | {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
    ),
    "command-r": Architecture(("cohere",), _ATTENTION | _MLP | {"input_layernorm": "attn_norm"}, whole=_TIED),
    "cohere2": Architecture(("cohere2",), _ATTENTION | _MLP | {"input_layernorm": "attn_norm"}, whole=_TIED),
    "exaone4": Architecture(("exaone4",), _AFTER | _QK_NORMS),
    "olmo2": Architecture(("olmo2", "olmo3"), _AFTER | _QK_NORMS),
    "olmoe": Architecture(("olmoe",), _ATTENTION | _NORMS | _QK_NORMS | _ROUTER, experts=_EXPERTS),
    "gemma": Architecture(("gemma",), whole=_TIED, norms=_ONE_ADDED),
    "gemma2": Architecture(("gemma2",), _GEMMA, whole=_TIED, norms=_ONE_ADDED),
    "gemma3": Architecture(("gemma3_text", "gemma3"), _GEMMA | _QK_NORMS, norms=_ONE_ADDED),
    "nemotron": Architecture(
        ("nemotron",), _ATTENTION | _NORMS | {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        norms=_ONE_ADDED,
    ),
    "phi2": Architecture(
        ("phi",),
        {**_ATTENTION, "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
         "input_layernorm": "attn_norm"},
        whole={**_WHOLE, "model.final_layernorm": "output_norm"},
    ),
    "phi3": Architecture(
        ("phi3",),
        _NORMS | {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
                  "mlp.down_proj": "ffn_down"},
    ),
    "phimoe": Architecture(
        ("phimoe",), _ATTENTION | _NORMS | {"block_sparse_moe.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp"},
        experts=_MIXTRAL, home="block_sparse_moe",
    ),
    "starcoder2": Architecture(
        ("starcoder2",), _ATTENTION | _NORMS | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    ),
    "stablelm": Architecture(("stablelm",)),
    "glm4": Architecture(
        ("glm4",),
        _ATTENTION | _NORMS | {
            "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
            "post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm",
        },
    ),
    "chatglm": Architecture(
        ("glm",), _ATTENTION | _NORMS | {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    ),
    "glm4moe": Architecture(
        ("glm4_moe",),
        _ATTENTION | _MLP | _QK_NORMS | _ROUTER | _SHARED_EXPERTS
        | {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
        experts=_EXPERTS,
    ),
    "ernie4_5": Architecture(("ernie4_5",)),
    "ernie4_5-moe": Architecture(("ernie4_5_moe",), _LLAMA | _ROUTER | _SHARED_EXPERTS, experts=_EXPERTS),
    "hunyuan-dense": Architecture(("hunyuan_v1_dense",)),
    "dots1": Architecture(("dots1",), _LLAMA | _QK_NORMS | _ROUTER | _SHARED_EXPERTS, experts=_EXPERTS),
    "apertus": Architecture(
        ("apertus",),
        _ATTENTION | _QK_NORMS | {
            "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "attention_layernorm": "attn_norm",
            "feedforward_layernorm": "ffn_norm",
        },
    ),
    "lfm2": Architecture(
        ("lfm2",),
        {
            **_ATTENTION, "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
            "self_attn.k_layernorm": "attn_k_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
            "feed_forward.w2": "ffn_down", "operator_norm": "attn_norm", "ffn_norm": "ffn_norm",
            "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj",
        },
        whole={"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output"},
    ),
    "gpt-oss": Architecture(
        ("gpt_oss",),
        _ATTENTION | {"mlp.router": "ffn_gate_inp", "input_layernorm": "attn_norm",
                      "post_attention_layernorm": "post_attention_norm"},
        refused={r"mlp\.experts.*": "the converter turns the stacks of experts round, and takes gate and up apart"},
    ),
    "llama4": Architecture(
        ("llama4", "llama4_text"),
        _ATTENTION | _NORMS
        | {name.replace("mlp.", "feed_forward."): tensor for name, tensor in (_MLP | _SHARED_EXPERT).items()}
        | {"feed_forward.router": "ffn_gate_inp"},
        refused={r"feed_forward\.experts.*": "the converter turns the stacks of experts round, and splits them"},
    ),
    "deepseek2": Architecture(
        ("deepseek_v2", "deepseek_v3"),
        _LLAMA | _ROUTER | _SHARED_EXPERTS | {
            "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
            "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
            "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        },
        experts=_EXPERTS,
        refused={r"self_attn\.kv_b_proj": "the converter splits it into k and v, and turns k round"},
    ),
    # names of their own
    "gpt2": Architecture(("gpt2",), _GPT, layers="transformer.h", whole=_OF_GPT2),
    "starcoder": Architecture(("gpt_bigcode",), _GPT, layers="transformer.h", whole=_OF_GPT2),
    "gptneox": Architecture(
        ("gpt_neox",),
        {"attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", **_H_TO_4H, **_NORMS},
        {"attn_qkv": GROUPS}, layers="gpt_neox.layers",
        whole={
            "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
            "lm_head": "output",
        },
    ),
    "bloom": Architecture(
        ("bloom",),
        {"self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output", **_H_TO_4H, **_NORMS},
        {"attn_qkv": GROUPS}, layers="transformer.h", whole=_OF_BLOOM,
    ),
    "falcon": Architecture(
        ("falcon",),
        {"self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output", **_H_TO_4H,
         "input_layernorm": "attn_norm"},
        {"attn_qkv": GROUPS}, layers="transformer.h", whole=_OF_BLOOM,
    ),
    "mpt": Architecture(
        ("mpt",),
        {"attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output", "ffn.up_proj": "ffn_up", "ffn.down_proj": "ffn_down",
         "norm_1": "attn_norm", "norm_2": "ffn_norm"},
        layers="transformer.blocks",
        whole={"transformer.wte": "token_embd", "transformer.norm_f": "output_norm", "lm_head": "output"},
    ),
    "t5": Architecture(
        ("t5", "mt5", "umt5"), {},
        whole={"shared": "token_embd", "lm_head": "output"},
        blocks={
            "encoder.block": ("enc.blk", _T5_BLOCK | _t5_feed_forward(1)),
            "decoder.block": (
                "dec.blk",
                _T5_BLOCK | {f"layer.1.EncDecAttention.{name}": f"cross_attn_{name}" for name in "qkvo"}
                | _t5_feed_forward(2),
            ),
        },
    ),
}  # fmt: skip
"""`general.architecture` -> what is known of it."""
