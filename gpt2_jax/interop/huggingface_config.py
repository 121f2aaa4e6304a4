"""config.json of transformers' GPT-2: the five sizes, and every setting that would make the model another function.

A setting is one of four kinds:
  a size                             read; a missing one has transformers' default
  a setting that the function        accepted with the value that this project computes, refused by name with any other
  depends on
  a setting without influence on     ignored
  the function
  anything else                      listed: transformers' GPT-2 does not know it either, and ignores it
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, NamedTuple

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.family import FAMILIES, family_of_model_type
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.files import read_text_file

HINT = "a folder that transformers' save_pretrained wrote for GPT2LMHeadModel"
_MAX_BYTES = 1_000_000

# Sizes with the defaults of transformers' GPT2Config, and the other names under which it takes them.
_SIZES = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
_OTHER_NAMES = {
    "max_position_embeddings": "n_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}
# transformers' names of one function, GELU by its tanh approximation.
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
_EPSILON = 1e-5  # of every LayerNorm
_OFF = (None, False)

# Settings of other architectures. A folder that has one with a value not listed here holds no GPT-2.
_OF_OTHER_MODELS: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "hidden_act": (None, *_TANH_GELU),
    **dict.fromkeys(
        (
            *("rope_theta", "rope_scaling", "rope_parameters", "rotary", "rotary_dim", "rotary_pct", "rotary_emb_base"),
            *("partial_rotary_factor", "use_rope", "alibi", "use_alibi", "relative_attention_num_buckets"),
            *("multi_query", "sliding_window", "window_size", "attention_types", "attention_layers", "layer_types"),
            *("use_parallel_residual", "parallel_attn", "rms_norm_eps", "use_rms_norm", "qk_norm", "use_qk_norm"),
            *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "embedding_multiplier", "logits_scaling"),
            *("num_experts", "num_local_experts", "mup_embeddings_scale", "mup_output_alpha", "mup_scale_qk_dot_by_d"),
        ),
        _OFF,
    ),
}

# Dropout acts in training only, and this project trains without; the rest concerns text generation, other heads, storage
# and programs.
_WITHOUT_INFLUENCE = """
    model_type architectures _name_or_path name_or_path transformers_version _commit_hash torch_dtype dtype tokenizer_class
    attn_pdrop embd_pdrop resid_pdrop summary_first_dropout classifier_dropout hidden_dropout attention_dropout
    initializer_range use_cache reorder_and_upcast_attn gradient_checkpointing attn_implementation _attn_implementation
    _attn_implementation_internal _attn_implementation_autoset use_flash_attention scale_attn_softmax_in_fp32
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_last_dropout n_special
    predict_special_tokens output_past num_labels _num_labels id2label label2id problem_type finetuning_task
    task_specific_params output_attentions output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder tie_encoder_decoder prefix generation_config transformers.js_config
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping max_time num_beams num_beam_groups
    penalty_alpha temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    force_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_return_sequences output_scores
    output_logits return_dict_in_generate cross_attention_hidden_size
"""


class HuggingfaceConfig(NamedTuple):
    sizes: GPT2Config
    unknown: dict[str, Any]  # settings that transformers' GPT-2 does not have


def read_huggingface_config(path: str | os.PathLike) -> HuggingfaceConfig:
    """What a config.json says. Gpt2JaxError for another function, naming the setting, and for sizes of no GPT-2."""
    settings = _read_object(path)
    # A key left out says nothing of the family: old folders lack it.
    if family_of_model_type(model_type := settings.get("model_type", "gpt2")) is None:
        expected = " or ".join(family.huggingface_model_type for family in FAMILIES)
        raise Gpt2JaxError(f"{path}: expected model_type {expected}, found {model_type!r}", HINT)
    sizes = {name: _size(path, settings, name, default) for name, default in _SIZES.items()}
    try:
        config = GPT2Config(
            max_sequence_length=sizes["n_positions"],
            vocab_size=sizes["vocab_size"],
            num_layers=sizes["n_layer"],
            num_heads=sizes["n_head"],
            channels=sizes["n_embd"],
        )
    except Gpt2JaxError as error:
        raise Gpt2JaxError(f"{path}: {error}", HINT) from None
    accepted = _accepted_values(config)
    for name, values in accepted.items():
        if name in settings and not any(_equal(settings[name], value) for value in values):
            raise Gpt2JaxError(f"{path}: expected {name} = {' or '.join(map(repr, values))}, found {settings[name]!r}", HINT)
    known = {*_SIZES, *_OTHER_NAMES, *accepted, *_WITHOUT_INFLUENCE.split()}
    return HuggingfaceConfig(config, {name: value for name, value in settings.items() if name not in known})


def read_end_of_text(path: str | os.PathLike) -> int | None:
    """The id of a config.json's token that ends a text; None where it names none, or several."""
    found = _read_object(path).get("eos_token_id")
    return found if type(found) is int else None


def _read_object(path: str | os.PathLike) -> dict[str, Any]:
    text = read_text_file(path, "a GPT-2 config", HINT, max_bytes=_MAX_BYTES)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Gpt2JaxError(f"{path}: expected a GPT-2 config in JSON, found: {error}", HINT) from None
    if not isinstance(settings, dict):
        raise Gpt2JaxError(f"{path}: expected a GPT-2 config, a JSON object, found {type(settings).__name__}", HINT)
    return settings


def _size(path: str | os.PathLike, settings: dict[str, Any], name: str, default: int) -> int:
    """One size under any of its names; two names must agree."""
    names = [name, *(other for other, meant in _OTHER_NAMES.items() if meant == name)]
    given = {alias: settings[alias] for alias in names if alias in settings}
    for alias, value in given.items():
        if type(value) is not int:  # a bool is none
            raise Gpt2JaxError(f"{path}: expected {alias} to be an integer, found {value!r}", HINT)
    if len(set(given.values())) > 1:
        found = " and ".join(f"{alias} = {value}" for alias, value in given.items())
        raise Gpt2JaxError(f"{path}: expected one {name}, found {found}", HINT)
    return next(iter(given.values()), default)


def _accepted_values(config: GPT2Config) -> dict[str, tuple[Any, ...]]:
    """For every setting that the function depends on the values with which it is the function of this project."""
    hidden = 4 * config.channels
    return _OF_OTHER_MODELS | {
        "activation_function": _TANH_GELU,
        "layer_norm_epsilon": (_EPSILON,),
        "layer_norm_eps": (None, _EPSILON),
        "norm_epsilon": (None, _EPSILON),
        "n_inner": (None, hidden),
        "intermediate_size": (None, hidden),
        "n_ctx": (None, config.max_sequence_length),
        "num_key_value_heads": (None, config.num_heads),
        "head_dim": (None, config.head_size),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "tie_word_embeddings": (True,),
        "pruned_heads": (None, {}),
        "quantization_config": (None,),
        "compression_config": (None,),
        "auto_map": (None,),  # the folder's own program
    }


def _equal(found: Any, accepted: Any) -> bool:
    """Equal also in type, since 1 is no true; numbers that are one in float32 are equal."""
    if type(found) is not type(accepted):
        return False
    return math.isclose(found, accepted, rel_tol=2.0**-24) if isinstance(found, float) else found == accepted
