# The environment on the workstation's side; apptainer.def is the same one for clusters. Both run container/build.sh.
#   docker build -t moco-pipeline --build-arg COMMIT=$(git rev-parse HEAD) .            or: moco image build
# The original's base. Old images disappear from registries: --build-arg BASE=… takes any other Debian or Ubuntu.
ARG BASE=nvidia/cuda:11.1.1-cudnn8-devel-ubuntu18.04
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Nothing of a home that is mounted may leak in; text is UTF-8 whatever the host's locale. DVC starts stages by $SHELL.
ENV LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/moco USER=moco SHELL=/bin/bash PATH=/opt/moco/bin:$PATH
# DVC waits for its stage on SIGINT alone, and the stage has to hear of it too, to save its state: it is what `docker
# stop` sends, and with --init it goes to every process.
ENV TINI_KILL_PROCESS_GROUP=1
STOPSIGNAL SIGINT

# Ordered by how seldom they change: system, packages, source.
COPY container/build.sh /opt/moco-build/container/
RUN /opt/moco-build/container/build.sh system
ARG UV_URL=
ARG TORCH=2.6.0
ARG TORCHVISION=0.21.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu118
COPY requirements/uv.txt requirements/image.txt /opt/moco-build/requirements/
RUN TORCH="$TORCH" TORCHVISION="$TORCHVISION" TORCH_INDEX="$TORCH_INDEX" UV_URL="$UV_URL" /opt/moco-build/container/build.sh packages
COPY pyproject.toml README.md /opt/moco-build/
COPY src /opt/moco-build/src
RUN /opt/moco-build/container/build.sh project

ARG VERSION=0.1.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="MoCo Pipeline" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
USER moco
WORKDIR /project
# Of the image, not of the project in /project.
HEALTHCHECK --interval=30m --timeout=2m CMD cd / && CUDA_VISIBLE_DEVICES= moco doctor --step
CMD ["moco", "--help"]
