from gpt2_jax.commands.main import run

if __name__ == "__main__":
    run("bench-scale")
