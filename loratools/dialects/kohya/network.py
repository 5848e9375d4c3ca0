"""The header's `ss_network_module` and `ss_network_args`: who trained it, and with which options.

An option is known to be without effect on what the tensors mean, or decides it and is implemented, or is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratools.dialects._frame.alphas import network_arguments
from loratools.dialects._frame.build import some
from loratools.dialects.peft.fields import unknown
from loratools.storage.lazy import LazyTensor

_MODULES = (
    "networks.lora", "networks.dylora", "networks.oft", "networks.boft", "networks.loha", "networks.lokr",
    "networks.lora_fa", "lycoris.kohya", "lycoris_kohya", "locon.locon_kohya",
)  # fmt: skip
"""Modules of sd-scripts, musubi-tuner and LyCORIS, and what the names of their variants for a model begin with."""

_TENSORS_TELL = frozenset({
    "algo", "conv_dim", "conv_alpha", "use_cp", "use_conv_cp", "use_tucker", "disable_conv_cp", "decompose_both",
    "factor", "full_matrix", "unbalanced_factorization", "block_size", "constraint", "rescaled", "train_norm",
    "preset", "dora_wd", "weight_decompose", "wd_on_output", "wd_on_out", "use_scalar", "rs_lora", "split_qkv",
    "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "train_double_block_indices",
    "train_single_block_indices", "train_blocks", "exclude_patterns", "include_patterns", "in_dims", "emb_dims",
    "img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim",
    "single_mod_dim", "context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim",
    "oft_block_size", "oft_coft", "coft", "coft_eps", "oft_block_share", "block_share", "enable_conv", "auto_adjust",
    "enable_all_linear", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor",
    "x_mod_dim", "self_attn_dim", "cross_attn_dim", "mlp_dim", "mod_dim", "llm_adapter_dim", "network_reg_dims",
})  # fmt: skip
"""Options that shaped the tensors, or are in the alphas (`rs_lora`)."""

_TRAINING_ONLY = frozenset({
    "dropout", "dropout_probability", "rank_dropout", "rank_dropout_scale", "module_dropout", "bypass_mode", "verbose",
    "unit", "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "train_t5xxl",
    "train_llm_adapter", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold",
    "network_reg_lrs", "ggpo_sigma", "ggpo_beta", "tgate", "reg_lrs",
})  # fmt: skip


def notes(header: Mapping[str, str], groups: Mapping[str, Mapping[str, LazyTensor]]) -> Iterator[str]:
    """Yield what a user must know of a header: an unknown network, unknown options, and what no tensor shows.

    `groups` are the parts of each module.
    """
    module = header.get("ss_network_module", "")
    if module and module != "None" and not module.startswith(_MODULES):
        yield f"the header's network {module} is not known here; its tensors are read as those of LoRA and LyCORIS"
    arguments = network_arguments(header)
    if names := unknown(arguments, _TENSORS_TELL, _TRAINING_ONLY):
        yield f"options in ss_network_args that are not known here, and have no effect: {', '.join(names)[:500]}"
    decomposed = any(str(arguments.get(name, "")).lower() in ("true", "1") for name in ("dora_wd", "weight_decompose"))
    plain = [m for m, parts in groups.items() if not {"dora_scale", "lora_magnitude_vector", "diff"} & parts.keys()]
    if decomposed and plain:
        yield f"ss_network_args says dora_wd, and there is no dora_scale for {some(sorted(plain))}"
