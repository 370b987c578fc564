# NVIDIA's Triton with what model_repo's python models import. Built from the repository's root:
#   docker build --file compose/images/triton.Dockerfile --tag moveline-triton:0.1.0 .
FROM nvcr.io/nvidia/tritonserver:26.08-py3

# Where else pip may look for torch. Empty: the default index, whose build can use a GPU.
ARG TORCH_INDEX=""

# The image's python is the distribution's (3.12), which refuses pip without the first line. The
# project is on PYTHONPATH instead of installed, as the local stack has it: its metadata asks for
# 3.11, because of the stub of the local stack, while this image has a stub of its own.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/opt/moveline

WORKDIR /opt/moveline

COPY pyproject.toml compose/images/requirements.py ./
RUN python3 requirements.py pyproject.toml \
        confluent-kafka msgspec numpy redis safetensors torch xxhash \
        > requirements.txt \
    && pip3 install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement requirements.txt

COPY features features
COPY scoring scoring
COPY streams streams

RUN install --directory --owner=1000 --group=1000 /models
USER 1000:1000
