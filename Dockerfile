# docker build -t gpt2-jax .                                 for CPUs
# docker build -t gpt2-jax --build-arg EXTRAS=cuda,data .    for NVIDIA GPUs, with datasets of the Hugging Face hub
# docker run --rm -it -v "$PWD:/work" gpt2-jax train --config demo
# docker run --rm -it --gpus all -v "$PWD:/work" gpt2-jax train --init d12 --dtype bfloat16
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -qq -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels \
    --config-settings=cmake.define.GPT2_JAX_REQUIRE_CUSTOM_CALLS=ON /source

FROM python:3.12-slim-bookworm
ARG EXTRAS=
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)${EXTRAS:+[$EXTRAS]}" && rm -r /wheels
# Runs and data are written below the folder that is mounted here.
WORKDIR /work
ENTRYPOINT ["gpt2-jax"]
CMD ["--help"]
