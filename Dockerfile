# A CPU image by default. For an NVIDIA GPU: --build-arg TORCH=cuda. See docs/install.md
FROM python:3.12-slim
ARG TORCH=cpu
ARG EXTRAS=lora,data,sft,gguf,report,serve
# Triton compiles small C files when one of its kernels first runs on a GPU
RUN if [ "$TORCH" != cpu ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
# PyPI has the build for CUDA
RUN if [ "$TORCH" = cpu ]; then \
      pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu; \
    else \
      pip install --no-cache-dir torch; \
    fi
COPY pyproject.toml README.md LICENSE /lisatune/
COPY src /lisatune/src
RUN pip install --no-cache-dir "/lisatune[$EXTRAS]"
# Any user may run it: with HOME here, models from the hub are kept in the folder that you mount
ENV HOME=/work USER=lisatune
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["lisatune"]
