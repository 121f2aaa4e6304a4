"""What a request may say: everything else is refused with the parameter that is to blame, in bounded time."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.serving.request import CompletionRequest, Limits, RequestError, read_request

LIMITS = Limits()


def read(**content) -> CompletionRequest:
    return read_request(json.dumps(content).encode(), "mine", LIMITS)


def test_the_least_request_has_openais_defaults():
    found = read(prompt="Once", model="mine")
    assert found == CompletionRequest("Once", max_tokens=16, temperature=1.0, top_p=1.0, n=1)


def test_all_that_is_done_is_read():
    asked = {"max_tokens": 5, "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "n": 2, "seed": 7, "echo": True}
    streams = {"stream": True, "stream_options": {"include_usage": True}}
    found = read(prompt=["Once"], stop="x", user="me", logit_bias={}, **streams, **asked)
    assert found == CompletionRequest("Once", **asked, stop=("x",), stream=True, include_usage=True)


@pytest.mark.parametrize(
    ("content", "param", "said"),
    [
        ({}, "prompt", "prompt: expected a string, found none"),
        ({"prompt": None}, "prompt", "prompt: expected a string, found none"),
        ({"prompt": 5}, "prompt", "prompt: expected a string, found 5"),
        ({"prompt": ["a", "b"]}, "prompt", "prompt: expected one string, found a list"),
        ({"prompt": "x" * 20_001}, "prompt", "prompt: expected at most 20,000 characters, found 20,001"),
        ({"prompt": "\ud800"}, "prompt", "prompt: expected Unicode, found half of a pair at character 0"),
        ({"prompt": "a", "model": "gpt-4"}, "model", "model: expected 'mine', found 'gpt-4'"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens: expected a whole number from 1"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "max_tokens: expected a whole number from 1"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens: expected a whole number from 1"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature: expected a number from 0 to 2, found -1"),
        ({"prompt": "a", "temperature": 10**400}, "temperature", "temperature: expected a number from 0 to 2"),
        ({"prompt": "a", "top_p": 0}, "top_p", "top_p: expected a number from"),
        ({"prompt": "a", "n": 9}, "n", "n: expected a whole number from 1 to 8, found 9"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop", "stop: expected at most 4 strings, found 5"),
        ({"prompt": "a", "stop": ""}, "stop", "stop: expected strings of at least one character"),
        ({"prompt": "a", "stop": "x" * 101}, "stop", "stop: expected at most 100 characters, found 101"),
        ({"prompt": "a", "stream": 1}, "stream", "stream: expected true or false, found 1"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "stream_options: expected only with stream"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options: expected an object"),
        ({"prompt": "a", "logprobs": 1}, "logprobs", "logprobs: expected to be left out"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "presence_penalty: expected to be left out"),
        ({"prompt": "a", "file": "/etc/passwd"}, "file", "file: expected one of model, prompt"),
    ],
)
def test_what_is_refused_is_named(content, param, said):
    with pytest.raises(RequestError) as error:
        read(**content)
    assert error.value.message.startswith(said)
    assert error.value.param == param
    assert error.value.status == (404 if param == "model" else 400)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 400_000, b'{"a":' * 100_000, b"1" * 400_000],
    ids=["empty", "open", "list", "null", "string", "bytes", "nan", "brackets", "objects", "digits"],
)
def test_what_is_no_json_object_is_refused_in_no_time(body):
    started = time.process_time()
    with pytest.raises(RequestError, match="body: expected") as error:
        read_request(body, "mine", LIMITS)
    assert len(error.value.message) < 300
    assert time.process_time() - started < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        *("prompt", "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "echo", "stream"),
        *("stream_options", "logprobs", "best_of", "logit_bias", "suffix", "user"),
    ]
)


@given(st.dictionaries(NAMES, JSON, max_size=6) | st.dictionaries(st.text(max_size=8), JSON, max_size=3))
def test_any_json_is_a_request_within_the_limits_or_refused(content):
    try:
        found = read_request(json.dumps({"prompt": "a", **content}).encode(), "mine", LIMITS)
    except RequestError as error:
        found = None
        json.dumps(error.body()).encode()
    if found is not None:
        assert isinstance(found.prompt, str)
        assert 1 <= found.n <= LIMITS.samples
        assert 0 <= found.temperature <= 2
        assert 0 < found.top_p <= 1


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_no_request(body):
    with pytest.raises(RequestError):
        read_request(body, "mine", LIMITS)
