from gpt2_jax.commands.main import run

run("check-gradients")
