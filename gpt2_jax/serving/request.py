"""A request for completions, as OpenAI's API has it: read from JSON, every value checked, and what it would cost bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait."""

    body_bytes: int = 1_000_000
    body_seconds: float = 10.0  # until a request's head, and then its body, have arrived
    prompt_characters: int = 20_000
    samples: int = 8
    stop_strings: int = 4
    stop_characters: int = 100
    seconds: float = 60.0  # of computing, and as many of waiting
    waiting: int = 16  # requests; the model answers one at a time
    connections: int = 64


@dataclass(frozen=True)
class CompletionRequest:
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False  # of a stream


class RequestError(Exception):
    """A request that cannot be met: the answer's status, and the parameter that is to blame."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# What OpenAI's API has, and this server does not do: the values that mean the same as leaving it out.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "presence_penalty": (0,),
    "suffix": (),
}
_NOT_HEEDED = ("user",)  # a name of the caller's own, for the records of OpenAI


def read_request(body: bytes, model: str, limits: Limits) -> CompletionRequest:
    """The request of a body for the served `model`; RequestError for anything that is no such request, or above the limits."""
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: expected JSON, found: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise RequestError(f"body: expected a JSON object, found {_shown(content)}")
    given = {name: value for name, value in content.items() if value is not None}
    for name, value in given.items():
        if name in _NOT_DONE and value not in _NOT_DONE[name]:
            raise RequestError(f"{name}: expected to be left out, as this server does not have it, found {_shown(value)}", name)
        if name not in (*_NOT_DONE, *_NOT_HEEDED, *_READERS):
            raise RequestError(f"{name[:50]}: expected one of {', '.join(_READERS)}, found an unknown parameter", name[:50])
    if "prompt" not in given:
        raise RequestError("prompt: expected a string, found none", "prompt")
    if given.get("model", model) != model:
        found = _shown(given["model"])
        raise RequestError(f"model: expected {model!r}, found {found}", "model", status=404, code="model_not_found")
    if "stream_options" in given and not given.get("stream"):
        raise RequestError("stream_options: expected only with stream, found them without", "stream_options")
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in _READERS:
            values |= _READERS[name](value, limits)
    return CompletionRequest(**values)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is not JSON")


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, (str, int, float, bool)) else f"a value of the type {type(value).__name__}"


def _refuse(name: str, expected: str, value: Any) -> NoReturn:
    raise RequestError(f"{name}: expected {expected}, found {_shown(value)}", name)


_Reader = Callable[[Any, Limits], dict[str, Any]]


def _number(name: str, lowest: float, highest: float, *, whole: bool = False) -> _Reader:
    def read(value: Any, limits: Limits) -> dict[str, Any]:
        expected = f"a{' whole' if whole else ''} number from {lowest:g} to {highest:g}"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            _refuse(name, expected, value)
        # An integer is compared as it is: it may have more digits than a float.
        if not lowest <= value <= highest:
            _refuse(name, expected, value)
        return {name: value if whole else float(value)}

    return read


def _flag(name: str) -> _Reader:
    def read(value: Any, limits: Limits) -> dict[str, Any]:
        if not isinstance(value, bool):
            _refuse(name, "true or false", value)
        return {name: value}

    return read


def _text(name: str, value: Any, most: int) -> str:
    if not isinstance(value, str):
        _refuse(name, "a string", value)
    if len(value) > most:
        raise RequestError(f"{name}: expected at most {most:,} characters, found {len(value):,}", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: expected Unicode, found half of a pair at character {error.start}", name) from None
    return value


def _read_prompt(value: Any, limits: Limits) -> dict[str, Any]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        (value,) = value
    if isinstance(value, list):
        raise RequestError("prompt: expected one string, found a list; ask once for each", "prompt")
    return {"prompt": _text("prompt", value, limits.prompt_characters)}


def _read_stop(value: Any, limits: Limits) -> dict[str, Any]:
    values = value if isinstance(value, list) else [value]
    if len(values) > limits.stop_strings:
        raise RequestError(f"stop: expected at most {limits.stop_strings} strings, found {len(values)}", "stop")
    stop = tuple(_text("stop", each, limits.stop_characters) for each in values)
    if "" in stop:
        _refuse("stop", "strings of at least one character", "")
    return {"stop": stop}


def _read_samples(value: Any, limits: Limits) -> dict[str, Any]:
    return _number("n", 1, limits.samples, whole=True)(value, limits)


def _read_stream_options(value: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        _refuse("stream_options", "an object with include_usage", value)
    return _flag("include_usage")(value.get("include_usage", False), limits)


_READERS: dict[str, _Reader] = {
    "model": lambda value, limits: {},
    "prompt": _read_prompt,
    "max_tokens": _number("max_tokens", 1, 1_000_000, whole=True),  # the model's positions are the limit
    "temperature": _number("temperature", 0, 2),
    "top_p": _number("top_p", math.ulp(0.0), 1),
    "top_k": _number("top_k", 0, 1_000_000, whole=True),
    "min_p": _number("min_p", 0, 1),
    "n": _read_samples,
    "stop": _read_stop,
    "seed": _number("seed", 0, 2**63 - 1, whole=True),
    "echo": _flag("echo"),
    "stream": _flag("stream"),
    "stream_options": _read_stream_options,
}
