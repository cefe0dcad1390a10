# syntax=docker/dockerfile:1
# docker build -t fmn . && docker run --rm -v fmn-work:/work fmn
# BASE_IMAGE: any Debian or Ubuntu with Python 3.11 or newer. TORCH_INDEX: where PyTorch comes from; the default is its
# CPU build, https://download.pytorch.org/whl/cu130 or an empty value is one for GPUs.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python3 -m venv /opt/fmn
COPY constraints.txt ./
RUN /opt/fmn/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch==2.13.0
COPY pyproject.toml README.md LICENSE params.yaml prefect.yaml .dvcignore ./
COPY .dvc/config .dvc/config
COPY fmn fmn
COPY flows flows
COPY data/miniature_glue data/miniature_glue
# The build has no git: --build-arg VERSION=0.2.0 says which version it is.
ARG VERSION=0.1.dev0
RUN SETUPTOOLS_SCM_PRETEND_VERSION=${VERSION} /opt/fmn/bin/pip install --no-cache-dir -c constraints.txt \
  '.[dask,lora,quickstart]'

FROM ${BASE_IMAGE}
WORKDIR /work
COPY --from=build /opt/fmn /opt/fmn
RUN useradd --create-home --uid 1000 fmn && cp -r /opt/fmn/lib/python3*/site-packages/fmn/quickstart/* . \
 && chown -R fmn .
ENV PATH=/opt/fmn/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
COPY --chown=1000 params params
HEALTHCHECK --interval=1m --timeout=10s CMD ["fmn", "--version"]
ENTRYPOINT ["fmn"]
CMD ["run"]
