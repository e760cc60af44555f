# certdraft in a container; the command is `certdraft`, the working directory /work is meant to be a volume:
#
#   docker build -t certdraft .
#   docker run --rm certdraft doctor
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -v ~/.cache/huggingface:/cache/huggingface \
#       certdraft fit --config recipes/qwen3-8b/eagle3 --data.record.corpus.source prompts.jsonl
#
# PyPI's torch brings CUDA, so the host needs NVIDIA's driver and container toolkit only. Without a GPU:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t certdraft:cpu .
FROM python:3.11-slim

# Triton compiles a launcher for its kernels with the C compiler it finds.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=""
COPY constraints.txt /tmp/constraints.txt
# torch has a layer of its own: a change of the sources does not load it again.
RUN pip install --no-cache-dir -c /tmp/constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch

COPY . /tmp/certdraft
RUN pip install --no-cache-dir -c /tmp/constraints.txt "/tmp/certdraft[gguf]" tensorboard \
    && rm -rf /tmp/certdraft /tmp/constraints.txt

# Any user may run it (docker run --user "$(id -u)"): caches lie where everyone may write.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor PYTHONUNBUFFERED=1
RUN mkdir -p /cache /work && chmod 1777 /cache /work
WORKDIR /work
ENTRYPOINT ["certdraft"]
CMD ["--help"]
