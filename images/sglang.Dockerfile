# SGLang with dflash-plugin beside it. The targets `cuda` and `cpu` are images; their arguments are
# in docker-bake.hcl, which `python -m ci images --write` makes. Before it is built:
#   python -m pip wheel --no-deps --wheel-dir dist .
# For networks with a proxy or a mirror of their own: --secret id=ca,src=BUNDLE, and
# --secret id=pip,src=PIP_CONF. There is no `syntax` line, for that would be an image from a
# registry: Docker 20.10 has all that is used here.

# Pinned by the bake file; or an image imported locally.
ARG BASE
# An image that is a folder of wheels, for what no index has: `tar -C FOLDER -c . | docker import -`.
ARG WHEELS=scratch
# hadolint ignore=DL3006
FROM ${WHEELS} AS wheels

# --- CUDA: SGLang's own image, the plugin, a patch set -------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS cuda
ARG BASE_NAME
ARG BASE_DIGEST
ARG ENGINE_VERSION
ARG VARIANT=stock
ARG SERIES_SHA256
ARG PLUGIN_VERSION
ARG REVISION
ARG SOURCE

# No index: the wheel needs `packaging` alone, which SGLang brings.
USER 0:0
RUN --mount=type=bind,source=dist,target=/dist \
    --mount=type=bind,source=images/install.sh,target=/install.sh \
    sh /install.sh python3 sglang "${VARIANT}" "${ENGINE_VERSION}" "${PLUGIN_VERSION}" "${SERIES_SHA256}"

# USER: torch asks for a name, and a user without an entry in passwd has no other.
ENV HOME=/var/lib/dflash \
    USER=dflash \
    HF_HOME=/var/cache/huggingface \
    XDG_CACHE_HOME=/var/cache/engine \
    DFLASH_CACHE=/var/cache/dflash-plugin
VOLUME ["/var/cache/huggingface", "/var/cache/engine", "/var/cache/dflash-plugin"]
USER 2000:0
WORKDIR /var/lib/dflash
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8000') + '/health', timeout=4)"]
LABEL org.opencontainers.image.title="sglang with dflash-plugin" \
      org.opencontainers.image.description="SGLang ${ENGINE_VERSION}, dflash-plugin ${PLUGIN_VERSION}, variant ${VARIANT}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${ENGINE_VERSION}-dflash-${VARIANT}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_NAME}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}" \
      dflash.engine.version="${ENGINE_VERSION}" \
      dflash.plugin.version="${PLUGIN_VERSION}" \
      dflash.patches.variant="${VARIANT}" \
      dflash.patches.sha256="${SERIES_SHA256}"
# The base has no entry point.
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0", "--port", "8000"]

# --- CPU: the engine as its lock has it, in a virtual environment -------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS cpu
# Versions are those of the base's Debian release.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 libstdc++6 \
    && rm -rf /var/lib/apt/lists/*

# One layer for torch and torchvision, without which SGLang does not start.
ARG TORCH
ARG TORCHVISION
# Empty: the wheels given and pip's own index (PyPI's torch for Linux is a CUDA build of several GB).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3042
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/var/cache/pip \
    export PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels; \
    if [ -s /etc/ssl/certs/ca-certificates.crt ]; then export PIP_CERT=/etc/ssl/certs/ca-certificates.crt; fi; \
    python3 -m venv /venv \
    && if [ -n "${TORCH_INDEX}" ]; then \
        /venv/bin/pip install "torch==${TORCH}+cpu" "torchvision==${TORCHVISION}+cpu" --extra-index-url "${TORCH_INDEX}"; \
    else \
        /venv/bin/pip install "torch==${TORCH}" "torchvision==${TORCHVISION}"; \
    fi

ARG LOCK
# hadolint ignore=DL3042
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=ci/locks,target=/locks \
    export PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels; \
    if [ -s /etc/ssl/certs/ca-certificates.crt ]; then export PIP_CERT=/etc/ssl/certs/ca-certificates.crt; fi; \
    /venv/bin/pip install --no-deps --require-hashes --requirement "/locks/${LOCK}"

ARG BASE_NAME
ARG BASE_DIGEST
ARG ENGINE_VERSION
ARG VARIANT=stock
ARG SERIES_SHA256
ARG PLUGIN_VERSION
ARG REVISION
ARG SOURCE
RUN --mount=type=bind,source=dist,target=/dist \
    --mount=type=bind,source=images/install.sh,target=/install.sh \
    sh /install.sh /venv/bin/python sglang "${VARIANT}" "${ENGINE_VERSION}" "${PLUGIN_VERSION}" "${SERIES_SHA256}"

# The platform is the plugin's: SGLang has none for a CPU without its kernels.
ENV PATH=/venv/bin:$PATH \
    SGLANG_PLATFORM=dflash_cpu \
    HOME=/var/lib/dflash \
    USER=dflash \
    HF_HOME=/var/cache/huggingface \
    XDG_CACHE_HOME=/var/cache/engine \
    DFLASH_CACHE=/var/cache/dflash-plugin
VOLUME ["/var/cache/huggingface", "/var/cache/engine", "/var/cache/dflash-plugin"]
USER 2000:0
WORKDIR /var/lib/dflash
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8000') + '/health', timeout=4)"]
LABEL org.opencontainers.image.title="sglang with dflash-plugin" \
      org.opencontainers.image.description="SGLang ${ENGINE_VERSION} for the CPU, dflash-plugin ${PLUGIN_VERSION}, variant ${VARIANT}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${ENGINE_VERSION}-dflash-${VARIANT}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_NAME}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}" \
      dflash.engine.version="${ENGINE_VERSION}" \
      dflash.plugin.version="${PLUGIN_VERSION}" \
      dflash.patches.variant="${VARIANT}" \
      dflash.patches.sha256="${SERIES_SHA256}"
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--device", "cpu", "--host", "0.0.0.0", "--port", "8000"]
