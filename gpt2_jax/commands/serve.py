"""Serve a model: a page to type into, and OpenAI's completions for programs, on this machine alone unless --host says so.

  python scripts/serve.py runs/latest
  python scripts/serve.py runs/latest --port 8123

A program asks http://127.0.0.1:8000/v1/completions, for example with openai.OpenAI(base_url="http://127.0.0.1:8000/v1").
A request can have nothing read and nothing run; its length, its time and the requests at a time are limited.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName, ComputeSettings, ModelSettings
from gpt2_jax.errors import Gpt2JaxError, announce
from gpt2_jax.files import FilePath


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[FilePath, tyro.conf.Positional]
    """A run folder (its newest complete checkpoint), a llm.c model file, a Hugging Face GPT-2 folder, or nanoGPT's
    ckpt.pt."""
    step: int | None = None
    """Of a run folder the checkpoint of this step instead."""
    tokenizer: FilePath | None = None
    """A llm.c tokenizer file; by default the tokenizer.bin beside the model file, else GPT-2's own vocabulary."""
    host: str = "127.0.0.1"
    """Address to listen at. Any other than the default lets other machines ask; there is no password."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    seconds: float = 60.0
    """The longest that a request may compute, and as long may it wait."""
    waiting: int = 16
    """Requests at a time, of which the model answers one after the other; more are sent away."""
    backend: BackendName = "auto"
    """Where the forward pass is computed."""

    def validate(self) -> None:
        if not 0 <= self.port < 65536:
            raise Gpt2JaxError(f"--port: expected a number from 0 to 65535, found {self.port}", "--port 8000")
        if not 0 < self.seconds < 1e6:
            raise Gpt2JaxError(f"--seconds: expected a number above 0, found {self.seconds}", "--seconds 60")
        if self.waiting < 1:
            raise Gpt2JaxError(f"--waiting: expected at least 1, found {self.waiting}", "--waiting 16")


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    arguments.validate()
    try:
        import uvicorn

        from gpt2_jax.serving.server import LOOPBACK, application, impatient_protocol
    except ImportError as error:
        raise Gpt2JaxError(f"serve: expected the package {error.name}, found none", "pip install 'gpt2_jax[serve]'") from None
    listening = _listen(arguments.host, arguments.port)  # before the model is loaded
    backend = select_backend(arguments.backend)  # before anything imports jax

    import jax.numpy as jnp

    from gpt2_jax.compute.backend import open_device
    from gpt2_jax.compute.decode import decoding_weights
    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.data.tokenizer import gpt2_tokenizer, tokenizer_beside, tokenizer_from_file
    from gpt2_jax.generate import samples
    from gpt2_jax.models.weights import load_weights, model_source
    from gpt2_jax.serving.request import Limits
    from gpt2_jax.serving.texts import ServedModel

    source = model_source(arguments.checkpoint, arguments.step)
    path = arguments.tokenizer or tokenizer_beside(source)
    tokenizer = gpt2_tokenizer() if path is None else tokenizer_from_file(path)
    config, params = load_weights(ModelSettings(init=source))
    open_device(backend)
    name, plan = Path(arguments.checkpoint).resolve().name, make_plan(ComputeSettings(), backend, config)
    model = ServedModel(name, plan, decoding_weights(plan, jnp.asarray(params)), tokenizer)
    # A first token: what is wrong with model or tokenizer is said now, and remarks once.
    for _ in samples(plan, model.weights, tokenizer, "", max_tokens=1):
        pass
    limits = Limits(seconds=arguments.seconds, waiting=arguments.waiting)
    is_loopback = arguments.host in LOOPBACK
    settings = uvicorn.Config(
        application(model, limits, LOOPBACK if is_loopback else ["*"]),
        http=impatient_protocol(limits.body_seconds),
        ws="none",
        lifespan="off",
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        log_level="warning",
        server_header=False,
    )
    host, port = listening.getsockname()[:2]
    announce(f"serving {name} ({source}) at http://{host}:{port}   (Ctrl-C ends it)")
    if not is_loopback:
        announce("every machine that reaches this one can ask; --host 127.0.0.1 is for this one alone")
    try:
        uvicorn.Server(settings).run(sockets=[listening])
    except KeyboardInterrupt:
        announce("ended")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise Gpt2JaxError(
            f"--port: expected to listen at {host}:{port}, found: {error.strerror or error}",
            f"--port {port + 1 if 0 < port < 65535 else 8000}",
        ) from None
