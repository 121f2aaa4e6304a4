"""python -m gpt2_jax: the console command `gpt2-jax`."""

from gpt2_jax.commands.main import main

if __name__ == "__main__":
    main()
