# The project's own services: topics, worker, lake, trainer. Built from the repository's root:
#   docker build --file compose/images/moveline.Dockerfile --tag moveline:0.1.0 .
FROM python:3.11.15-slim-bookworm

# Where else pip may look for torch. Empty: the default index, whose Linux build carries gigabytes
# of CUDA libraries. An index with CPU builds makes the image several times smaller.
ARG TORCH_INDEX=""

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# `moveline train` compiles what it exports; without a compiler answers take three times as long.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/moveline

# Dependencies in a layer of their own: a change of our code does not install torch again.
COPY pyproject.toml compose/images/requirements.py ./
RUN python requirements.py pyproject.toml > requirements.txt \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement requirements.txt

COPY README.md LICENSE ./
COPY features features
COPY streams streams
COPY trainer trainer
COPY scoring scoring
COPY compose compose
RUN pip install --no-deps .

# Read by the one-shot `model-files`, which lays it over the volume.
COPY model_repo model_repo

# User 1000 is also Triton's user in its image: both own the model volume, whoever mounts it first.
RUN useradd --uid 1000 --create-home moveline \
    && install --directory --owner=moveline --group=moveline /models /lake /packages
USER moveline
WORKDIR /home/moveline

ENTRYPOINT ["moveline"]
CMD ["--help"]
