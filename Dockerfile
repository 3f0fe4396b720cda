# One image for workers, the HTTP gateway, the command line and Flower. Build arguments choose the build of torch:
#
#   TORCH_INDEX_URL     package index that torch comes from; empty for pip's default (current CUDA on Linux x86-64).
#                       The CPU build and CUDA 12.6 (Pascal cards) have indexes of their own: docs/operations.md.
#   TORCH_REQUIREMENT   what is installed from it.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY engine engine
COPY worker worker
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS environment
ARG TORCH_INDEX_URL=""
ARG TORCH_REQUIREMENT="torch==2.13.0"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/lamella
ENV PATH=/opt/lamella/bin:$PATH
COPY constraints.txt /tmp/constraints.txt
# torch alone and first: it is the largest layer, and the only one that may come from another index.
RUN if [ -n "$TORCH_INDEX_URL" ]; then set -- --index-url "$TORCH_INDEX_URL"; else set --; fi; \
    pip install "$@" "$TORCH_REQUIREMENT"
COPY --from=wheel /wheels /tmp/wheels
# The installed torch stays: its exact build joins the constraints in place of the pin.
RUN grep -v '^torch==' /tmp/constraints.txt > /tmp/pins.txt \
    && pip freeze | grep '^torch==' >> /tmp/pins.txt \
    && pip install --constraint /tmp/pins.txt "$(ls /tmp/wheels/lamella-*.whl)[worker,server,flower,encryption,tracing]"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="lamella" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=environment /opt/lamella /opt/lamella
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin lamella \
    && install -d -o lamella -g lamella /var/lib/lamella/shards /var/lib/lamella/hub \
    && install -d -m 0700 -o lamella -g lamella /var/lib/lamella/files
ENV PATH=/opt/lamella/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LAMELLA_STORE=/var/lib/lamella/shards \
    HF_HOME=/var/lib/lamella/hub
USER lamella
WORKDIR /home/lamella
VOLUME /var/lib/lamella/shards
ENTRYPOINT ["lamella"]
CMD ["--help"]
