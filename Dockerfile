# onecard on a CUDA machine: docker build -t onecard . ; docker run --gpus all -v "$PWD:/data" onecard plan ...
# docs/docker.md says how to use it. It has been linted; it has not been built on a GPU machine.
FROM python:3.12-slim-bookworm

# torch's wheel for Linux is a CUDA build and brings CUDA's libraries; the host needs the driver and NVIDIA's container
# toolkit. For a build of another CUDA version name its index: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cuNNN
ARG TORCH_INDEX=""

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/data/.cache/huggingface

# Triton makes the launcher of its kernels with a C compiler when they first run.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/onecard

# torch alone first, in the version of constraints.txt: its layer stays while the code changes.
COPY constraints.txt ./
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt

COPY . .
RUN pip install -c constraints.txt . \
    && useradd --create-home --uid 1000 onecard \
    && mkdir /data \
    && chown onecard:onecard /data

USER 1000
WORKDIR /data
ENTRYPOINT ["onecard"]
CMD ["--help"]
