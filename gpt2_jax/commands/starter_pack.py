"""Write the files that llm.c's Python script writes: a model in float32 and bfloat16, a debug state, and the tokenizer.

  python scripts/write_starter_pack.py --init d12 --output-dir starter
  python scripts/write_starter_pack.py --init runs/NAME --step 300 --output-dir starter

llm.c's test programs then check this project's logits, loss and gradients against their own. The batch of
the debug state is by default of the built-in text, which has to be prepared once: python scripts/prepare_data.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpt2_jax.commands.command_line import parse
from gpt2_jax.compute.backend import select_backend
from gpt2_jax.config import BackendName, ModelSettings
from gpt2_jax.files import FilePath
from gpt2_jax.output import output_is_no_result


@dataclass(frozen=True)
class Arguments:
    output_dir: FilePath
    """Folder for the four files."""
    init: FilePath = "d12"
    """A descriptor (d12, gpt3:c768), a run folder (its newest complete checkpoint), a llm.c model file, or a Hugging Face
    GPT-2 folder."""
    step: int | None = None
    """Of a run folder the checkpoint of this step."""
    batch_size: int = 4
    """Sequences of the debug state's batch."""
    sequence_length: int = 64
    """Tokens of each sequence."""
    tokens: FilePath = "data/kjv_val.bin"
    """Token shard whose first tokens are the batch."""
    backend: BackendName = "auto"
    """Where logits, loss and gradients are computed."""


def main(words: list[str]) -> None:
    arguments = parse(Arguments, __doc__, words)
    output_is_no_result()
    backend = select_backend(arguments.backend)  # before anything imports jax

    from gpt2_jax.compute.plan import make_plan
    from gpt2_jax.config import ComputeSettings
    from gpt2_jax.models.weights import load_weights, model_source
    from gpt2_jax.starter_pack import first_batch, write_starter_pack

    source = model_source(arguments.init, arguments.step)
    print(f"making {source} ...", flush=True)
    config, params = load_weights(ModelSettings(init=source))
    # The reference, at the highest precision.
    plan = make_plan(ComputeSettings(matmul="xla", matmul_precision="highest"), backend, config)
    batch = first_batch(arguments.tokens, config.vocab_size, arguments.batch_size, arguments.sequence_length)
    name = Path(source).stem.replace(":", "-").removeprefix("gpt2_")
    for path in write_starter_pack(Path(arguments.output_dir), name, plan, params, *batch):
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)
