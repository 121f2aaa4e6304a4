"""The server over a real connection: what OpenAI's client gets, what a browser gets, and what hostile requests get."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.compute.decode import decoding_weights
from gpt2_jax.data.tokenizer import gpt2_tokenizer
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.generate import samples
from gpt2_jax.models.initialize import initialize_parameters
from gpt2_jax.serving.request import Limits
from gpt2_jax.serving.texts import ServedModel
from tests.conftest import plan_of

uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
server = pytest.importorskip("gpt2_jax.serving.server")

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
CONFIG = GPT2Config(max_sequence_length=64, vocab_size=50257, num_layers=1, num_heads=2, channels=16)
PLAN = plan_of(CONFIG)
LIMITS = Limits(body_seconds=1.0, body_bytes=100_000, waiting=2, seconds=20.0)
PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return ServedModel("tiny", PLAN, decoding_weights(PLAN, jnp.asarray(initialize_parameters(CONFIG))), gpt2_tokenizer())


@contextmanager
def serving(model: ServedModel, limits: Limits):
    listening = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(
        server.application(model, limits, server.LOOPBACK),
        http=server.impatient_protocol(limits.body_seconds),
        ws="none",
        lifespan="off",
        limit_concurrency=limits.connections,
        log_level="warning",
    )
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=asyncio.run, args=(running.serve(sockets=[listening]),))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(model):
    with serving(model, LIMITS) as port:
        yield port


def ask(port: int, content, *, path: str = "/v1/completions", method: str = "POST", **headers):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = content if isinstance(content, (bytes, type(None))) else json.dumps(content)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    with connection:
        return answer.status, answer.headers, answer.read()


# http.client's connections are no context managers.
http.client.HTTPConnection.__enter__ = lambda self: self
http.client.HTTPConnection.__exit__ = lambda self, *_: self.close()


@pytest.fixture
def client(port):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected_text(model: ServedModel, seed: int, max_tokens: int = 12) -> str:
    grown = samples(model.plan, model.weights, model.tokenizer, PROMPT, max_tokens=max_tokens, seed=seed + 1)
    return [texts[0].text for texts in grown][-1]


def test_openais_client_gets_the_models_own_text(client, model):
    assert [each.id for each in client.models.list()] == ["tiny"]
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=3, n=2)
    assert [choice.text for choice in answer.choices] == [expected_text(model, 3), expected_text(model, 4)]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 24)
    echoed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, seed=3, echo=True)
    assert echoed.choices[0].text.startswith(PROMPT)


def test_a_stream_says_the_same_piece_by_piece(client, model):
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, seed=3, stream=True, stream_options={"include_usage": True}
        )
    )
    *texts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == expected_text(model, 3)
    assert len(texts) > 2
    assert texts[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 12


def test_a_stop_string_ends_the_text_in_front_of_it(client, model):
    whole = expected_text(model, 3)
    stop = whole[7:10]
    for stream in (False, True):
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=3, stop=stop, stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_openais_client_raises_what_was_refused(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature: expected a number from 0 to 2, found 3"):
        client.completions.create(model="tiny", prompt=PROMPT, temperature=3)
    with pytest.raises(openai.NotFoundError, match="model: expected 'tiny'"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="expected at most 64 tokens with max_tokens") as error:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=61)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="use /v1/completions"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


def test_the_page_may_load_nothing_and_be_framed_by_nobody(port):
    status, headers, body = ask(port, None, path="/", method="GET")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert b"http://" not in body
    assert b"https://" not in body


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed: apt-get install chromium")
def test_a_browser_types_and_reads(port, model):
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        api.expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#prompt", PROMPT)
        for name, value in {"max_tokens": "12", "temperature": "1", "top_k": "0", "seed": "3"}.items():
            page.fill(f"#{name}", value)
        page.click("#go")
        api.expect(page.locator("#note")).to_contain_text("a second", timeout=30_000)
        assert page.locator("#text").text_content() == PROMPT + expected_text(model, 3)
        page.click("#more")
        assert page.input_value("#prompt") == PROMPT + expected_text(model, 3)
        page.fill("#max_tokens", "1000")
        page.click("#go")
        api.expect(page.locator("#note")).to_contain_text("expected at most 64 tokens")
        # The refusal itself is all that the console has.
        assert [problem for problem in problems if "400" not in problem] == []
        browser.close()


# Hostile requests.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "attacker.example"}, 400),  # a page that gave its name the address of this machine
        ({"Content-Type": "text/plain"}, 415),  # what a page of another site can send without asking
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_a_page_of_another_site_gets_nothing(port, headers, status):
    found, answered, _ = ask(port, {"prompt": PROMPT, "max_tokens": 1}, **headers)
    assert found == status
    assert "Access-Control-Allow-Origin" not in answered
    asked_first, answered, _ = ask(port, None, method="OPTIONS", Origin="https://attacker.example")
    assert asked_first == 405
    assert "Access-Control-Allow-Origin" not in answered


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "' + b"a" * 1_000_000 + b'"}', 413),
        (b'{"prompt": "' + b"a" * 90_000 + b'"}', 400),
        (b'{"prompt": "' + b" a" * 9_000 + b'"}', 400),  # more tokens than positions
        (b"[" * 90_000, 400),
        (b"\x00\xff", 400),
        (json.dumps({"prompt": "\u0000\u202e\U0010ffff<|endoftext|>" * 3, "max_tokens": 1}).encode(), 200),
        (b'{"prompt": "../../etc/passwd", "max_tokens": 1}', 200),  # a text like any other
    ],
    ids=["a million", "too long", "too many tokens", "brackets", "bytes", "odd characters", "a path"],
)
def test_hostile_bodies_are_answered(port, body, status):
    found, _, answer = ask(port, body)
    assert found == status
    assert len(answer) < 2000
    assert "error" in json.loads(answer) or found == 200


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def received(connection: socket.socket) -> bytes:
    found = b""
    while chunk := connection.recv(4096):
        found += chunk
    return found


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n", b""),
        (HEAD + b"Content-Length: 50\r\n\r\n{", b"408"),
        (b"\x16\x03\x01\x02\x00garbage\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, b"400"),
    ],
    ids=["nothing", "half a head", "half a body", "no http", "an endless head"],
)
def test_a_request_that_hangs_is_ended(port, sent, answered):
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        found = received(connection)
    assert answered in found[:40]
    assert bool(found) == bool(answered)
    assert time.monotonic() - started < 15  # the limit is 1 s
    assert ask(port, {"prompt": PROMPT, "max_tokens": 1})[0] == 200


class SlowTokens:
    """In place of the model's pieces: one every tenth of a second, counted."""

    def __init__(self):
        self.made = 0

    def __call__(self, model, request, seed):
        from gpt2_jax.serving.texts import Piece

        for number in range(request.max_tokens):
            time.sleep(0.1)
            self.made += 1
            yield Piece(0, "x", "length" if number + 1 == request.max_tokens else None)


@pytest.fixture
def slow(monkeypatch) -> SlowTokens:
    tokens = SlowTokens()
    monkeypatch.setattr(server, "pieces", tokens)
    return tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_is_not_computed_for(port, slow, stream):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 50, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.4)
    assert ask(port, {"prompt": PROMPT, "max_tokens": 1})[0] == 200  # its turn comes when the other has been given up
    assert slow.made < 25


def test_more_requests_than_may_wait_are_sent_away(port, slow):
    statuses: list[int] = []

    def one() -> None:
        statuses.append(ask(port, {"prompt": PROMPT, "max_tokens": 5})[0])

    threads = [threading.Thread(target=one) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(statuses) == [200, 200, 429, 429, 429]


def test_a_request_that_takes_too_long_is_ended(model, slow):
    with serving(model, Limits(seconds=0.3)) as port:
        status, headers, body = ask(port, {"prompt": PROMPT, "max_tokens": 50})
        assert status == 503
        assert headers["Retry-After"]
        assert "expected to be done within 0.3 s" in json.loads(body)["error"]["message"]
        status, _, body = ask(port, {"prompt": PROMPT, "max_tokens": 50, "stream": True})
        assert status == 200  # the text had begun
        events = [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line]
        assert "expected to be done within 0.3 s" in events[-1]["error"]["message"]
    assert slow.made < 20


def test_the_models_texts_are_not_mixed(port, model):
    """Requests at the same time, each with its own seed."""
    found: dict[int, str] = {}

    def one(seed: int) -> None:
        _, _, body = ask(port, {"prompt": PROMPT, "max_tokens": 12, "seed": seed})
        found[seed] = json.loads(body)["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(seed,)) for seed in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {seed: expected_text(model, seed) for seed in (5, 6)}
    assert len(set(found.values())) == 2
    assert np.isfinite(model.weights.flat_N).all()
