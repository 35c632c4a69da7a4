# docker build --tag dmjd .
# docker run --rm --ipc host --volume "$PWD:/work" --user "$(id -u):$(id -g)" dmjd pretrain --data photos --out runs/new
#
# The default is torch's small build for CPUs. For NVIDIA's GPUs (and docker run --gpus all):
# docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --tag dmjd:cuda .
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# torch.compile and Triton build what they run on a GPU.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.lock /tmp/
# Of that index torch alone, which has none of the other locked versions.
RUN pip install --no-cache-dir --no-deps --constraint /tmp/requirements.lock --index-url "$TORCH_INDEX" torch torchvision
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --constraint /tmp/requirements.lock /tmp/wheels/*.whl
# Whoever the container runs as, caches need a home that can be written.
ENV HOME=/tmp
RUN useradd --no-create-home dmjd && install --directory --owner dmjd /work
USER dmjd
WORKDIR /work
ENTRYPOINT ["dmjd"]
CMD ["--help"]
