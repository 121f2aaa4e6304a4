"""GPT-2 training in JAX over one flat buffer, file-compatible with llm.c.

Importing the package imports nothing of JAX. It only sets, before JAX can start, the one XLA flag without which some
versions of jaxlib compute wrong numbers on the CPU.
"""

from gpt2_jax.jax_compat import switch_off_ynnpack_fusions

__version__ = "0.1.0"

switch_off_ynnpack_fusions()
