"""Every setting of a config.json is a size, accepted, refused by name, ignored for a reason, or listed."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.interop.huggingface_config import read_huggingface_config
from tests.conftest import TINY
from tests.interop.folders import config_json, write_config


@pytest.fixture
def read(tmp_path):
    """Read TINY's config.json with changes."""

    def read_changed(**changes):
        write_config(tmp_path, TINY, **changes)
        return read_huggingface_config(tmp_path / "config.json")

    return read_changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "expected scale_attn_by_inverse_layer_idx = False, found True"),
        ({"scale_attn_weights": False}, "expected scale_attn_weights = True, found False"),
        ({"scale_attn_weights": None}, "expected scale_attn_weights = True, found None"),
        ({"scale_attn_weights": 1}, "expected scale_attn_weights = True, found 1"),
        ({"add_cross_attention": True}, "expected add_cross_attention = False, found True"),
        ({"is_encoder_decoder": True}, "expected is_encoder_decoder = False, found True"),
        ({"tie_word_embeddings": False}, "expected tie_word_embeddings = True, found False"),
        ({"activation_function": "gelu"}, "expected activation_function = 'gelu_new' or .*, found 'gelu'"),
        ({"activation_function": "relu"}, "found 'relu'"),
        ({"activation_function": None}, "expected activation_function .*, found None"),
        ({"layer_norm_epsilon": 1e-6}, "expected layer_norm_epsilon = 1e-05, found 1e-06"),
        ({"layer_norm_epsilon": 0}, "expected layer_norm_epsilon = 1e-05, found 0"),
        ({"layer_norm_epsilon": "1e-5"}, "expected layer_norm_epsilon = 1e-05, found '1e-5'"),
        ({"n_inner": 7}, "expected n_inner = None or 128, found 7"),
        ({"n_ctx": 8}, "expected n_ctx = None or 16, found 8"),
        ({"quantization_config": {"bits": 8}}, "expected quantization_config = None, found {'bits': 8}"),
        ({"pruned_heads": {"0": [1]}}, "expected pruned_heads"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "expected auto_map = None"),
        ({"model_type": "llama"}, "expected model_type gpt2, found 'llama'"),
        ({"model_type": None}, "expected model_type gpt2, found None"),
        ({"model_type": ["gpt2"]}, "expected model_type gpt2, found"),
        ({"rope_theta": 10000.0}, "expected rope_theta = None or False, found 10000.0"),
        ({"position_embedding_type": "rotary"}, "expected position_embedding_type = None or 'absolute', found 'rotary'"),
        ({"num_key_value_heads": 2}, "expected num_key_value_heads = None or 4, found 2"),
        ({"hidden_act": "silu"}, "expected hidden_act .*, found 'silu'"),
        ({"n_head": 5}, "multiple of num_heads"),
        ({"n_layer": 0}, "num_layers: expected at least 1, found 0"),
        ({"n_embd": "wide"}, "expected n_embd to be an integer, found 'wide'"),
        ({"n_embd": "32"}, "expected n_embd to be an integer, found '32'"),
        ({"n_embd": 32.0}, "expected n_embd to be an integer, found 32.0"),
        ({"n_layer": True}, "expected n_layer to be an integer, found True"),
        ({"n_positions": None}, "expected n_positions to be an integer, found None"),
        ({"vocab_size": [203]}, "expected vocab_size to be an integer"),
        ({"num_hidden_layers": 3}, "expected one n_layer, found n_layer = 2 and num_hidden_layers = 3"),
    ],
)
def test_another_function_is_refused_by_the_settings_name(read, change, message):
    with pytest.raises(Gpt2JaxError, match=rf"config.json: .*{message}") as caught:
        read(**change)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu_new"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"layer_norm_epsilon": 9.999999747378752e-06},  # 1e-5 of a file that went through float32
        {"n_inner": None},
        {"n_inner": 128},
        {"n_ctx": 16},
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": True},
        {"quantization_config": None, "rope_scaling": None, "use_rope": False, "pruned_heads": {}},
        {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16},
        {"attn_pdrop": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.2, "summary_type": "mean", "use_cache": False},
        {"torch_dtype": "float16", "dtype": "bfloat16", "architectures": ["GPT2Model"], "transformers_version": "5.0.0"},
        {"eos_token_id": [1, 2], "task_specific_params": {"text-generation": {"do_sample": True}}, "initializer_range": 9},
    ],
)
def test_what_does_not_change_the_function_is_read_and_not_listed(read, change):
    assert read(**change) == (TINY, {})


def test_the_other_names_of_sizes_are_honoured(tmp_path):
    """transformers takes them for the same sizes."""
    names = {"n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers", "n_embd": "hidden_size"}
    settings = {names.get(name, name): value for name, value in config_json(TINY).items()}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_huggingface_config(tmp_path / "config.json").sizes == TINY


def test_missing_sizes_are_gpt2s(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_huggingface_config(tmp_path / "config.json").sizes == GPT2Config(1024, 50257, 12, 12, 768)


def test_settings_of_no_gpt2_are_listed(read):
    found = read(my_note="hello", n_langs=3)
    assert found == (TINY, {"my_note": "hello", "n_langs": 3})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NAMES = [
    *config_json(TINY),
    "n_ctx",
    "n_inner",
    "layer_norm_epsilon",
    "activation_function",
    "scale_attn_weights",
    "rope_theta",
]


@given(changes=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_values_are_read_or_refused(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp()
    write_config(folder, TINY, **changes)
    with suppress(Gpt2JaxError):
        assert isinstance(read_huggingface_config(folder / "config.json").sizes, GPT2Config)
