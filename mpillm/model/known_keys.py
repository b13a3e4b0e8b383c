"""Configuration keys that families do not read: those that are harmless, and those that would change the result.

Any other one is ignored, as transformers ignores it, and said in the report.
"""

from __future__ import annotations

import re
from typing import Any

# Housekeeping of transformers' PretrainedConfig, training-time settings, and marks that exporters leave.
_BOOKKEEPING = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled _from_model_config _name_or_path
    attn_implementation auto_map base_model base_model_name_or_path chunk_size_feed_forward custom_pipelines dtype
    finetuning_task fused_rms_norm_training gradient_checkpointing id2label initializer_range is_decoder is_llama_config
    keys_to_ignore_at_inference label2id license max_sequence_length model_max_length model_name name_or_path num_labels
    onnx output_attentions output_hidden_states prefix pretraining_tp problem_type return_dict return_dict_in_generate
    seq_length task_specific_params tie_last_hidden_states tokenizer_class tokenizer_model_max_length torch_dtype
    num_nextn_predict_layers torchscript trainable transformers.js_config transformers_version transformers_weights
    use_bfloat16 use_cache use_flash_attention use_flash_attn use_return_dict vocab_padded vocab_type
    attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout dropout embd_pdrop hidden_dropout
    hidden_dropout_prob neftune_noise_alpha residual_dropout resid_pdrop output_router_logits router_aux_loss_coef
    router_jitter_noise
    router_z_loss_coef padding_idx pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    decoder_start_token_id pooling_type classifier_from_token is_original_qwen3_reranker method
    use_pad_token use_sep_token
""".split()  # noqa: SIM905 (a list of strings would fill three screens)

# Defaults of text generation, which old configurations carry; what a request asks for is in the job.
_GENERATION = """
    assistant_early_exit bad_words_ids begin_suppress_tokens constraints diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids
    forced_bos_token_id forced_eos_token_id guidance_scale length_penalty low_memory max_length max_new_tokens max_time
    min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_beam_groups num_beams
    num_return_sequences output_logits output_scores penalty_alpha remove_invalid_values renormalize_logits
    repetition_penalty sequence_bias stop_strings suppress_tokens temperature tf_legacy_loss token_healing top_h top_k
    top_p typical_p
""".split()  # noqa: SIM905 (a list of strings would fill three screens)

HARMLESS = frozenset(_BOOKKEEPING) | frozenset(_GENERATION)
HARMLESS_PATTERN = re.compile(
    r"(_?unsloth|axolotl|_?gguf|general\.|transformers\.js)[\w.]*|_[a-z]\w*_version"
)

# Features this decoder does not have (or always has), with the values that mean so, besides null.
SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (0,),
    "attention_multiplier": (),
    "attention_out_bias": (False,),
    "attn_logit_softcapping": (0, 0.0),
    "attn_temperature_tuning": (False, 0),
    "bias": (False,),
    "causal": (True,),
    "clip_qkv": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (0, 0.0),
    "first_k_dense_replace": (0,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "n_group": (0, 1),
    "n_shared_experts": (0,),
    "no_bias": (True,),
    "norm_type": ("rms_norm", "rmsnorm"),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_shared_experts": (0,),
    "parallel_attn": (False,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "quantization_config": ({},),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0),
    "rope_interleaved": (False,),
    "rope_ratio": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "router_bias": (False,),
    "routed_scaling_factor": (1, 1.0),
    "scale_attn_weights": (True,),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "topk_group": (0, 1),
    "use_alibi": (False,),
    "use_bias": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qkv_bias": (False,),
    "use_rms_norm": (True,),
    "use_sliding_window": (False,),
}


# Features of other models by their keys: whatever value one has, it may change the result.
_OTHERS = """
    alibi_bias_max attention_logit_cap attention_window attn_output_gate block_types dim_model_base embedding_scale
    final_logit_softcap head_scale index_topk key_multiplier kv_lora_rank lm_head_multiplier logits_soft_cap
    mup_scale_factor mup_use_scaling mup_width_scale parallel_residual position_embedding_type post_norm q_lora_rank
    qk_norm residual_scale sandwich_norm scale_depth scale_emb scale_embeddings swiglu_limit
    use_gated_attention use_post_norm use_sinks window_size
""".split()  # noqa: SIM905 (a list of strings would fill a screen)

SWITCHES = frozenset(_OTHERS) | SWITCHED_OFF.keys()


def is_harmless(key: str, value: Any) -> bool:
    """Return whether an unread key with this value is known to leave the result as it is."""
    if value is None or key in HARMLESS or HARMLESS_PATTERN.fullmatch(key):
        return True
    # 1 == True in Python: the type is compared too.
    return any(type(value) is type(off) and value == off for off in SWITCHED_OFF.get(key, ()))


def is_switch(key: str) -> bool:
    """Return whether a key is known to change what some models compute."""
    return key in SWITCHES
