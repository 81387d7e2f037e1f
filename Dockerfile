# The image of every pod: head, workers and submitter. About 10 GB; GPU nodes need NVIDIA's driver 580 or newer.
#
#   docker build --platform linux/amd64 --tag tunesmith:0.1.0 .
#   docker tag tunesmith:0.1.0 REGISTRY/tunesmith:0.1.0
#   docker push REGISTRY/tunesmith:0.1.0
#
# REGISTRY is ACCOUNT.dkr.ecr.REGION.amazonaws.com for Amazon's; `image` in the chart's values names the result.

# Not NVIDIA's image: torch's wheels bring CUDA's libraries, and a second set would double them. Python is the tests' own.
FROM python:3.11.15-slim-bookworm AS base
# g++: triton and torch.compile build at run time. git: the chart's `git`. wget: the probes of older KubeRay.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ git wget \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# The user owns the environment, so that `pip install` works in a pre_script.
RUN useradd --uid 1000 --create-home --shell /bin/bash tunesmith \
 && install --directory --owner=tunesmith --group=tunesmith /opt/venv
WORKDIR /home/tunesmith
# A number: the kubelet can't tell whether a name is root.
USER 1000
RUN python -m venv /opt/venv && pip install pip==26.3

FROM base AS wheel
COPY --chown=1000:1000 . checkout
RUN pip wheel --no-deps --build-constraint checkout/requirements-image.txt --wheel-dir dist ./checkout

FROM base
COPY requirements-image.txt .
RUN pip install --no-deps --build-constraint requirements-image.txt --requirement requirements-image.txt \
 && pip check
COPY --from=wheel /home/tunesmith/dist dist
RUN pip install --no-deps dist/*.whl
# NVIDIA_VISIBLE_DEVICES stays unset: with `all`, a head on a GPU node would see the GPUs of others.
# HOME may lie on a network's disk, where ranks that share triton's cache trip over each other.
# FlashInfer's sampler would be compiled as vLLM starts, by an nvcc that isn't here.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA=cuda>=13.0 \
    TRITON_CACHE_DIR=/tmp/triton \
    VLLM_USE_FLASHINFER_SAMPLER=0
