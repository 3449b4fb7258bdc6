# docker build -t mtp-lightning .                          for CPUs
# docker build --build-arg TORCH=cuda -t mtp-lightning .   for GPUs; docker run --gpus all ..
# docker run --rm -v "$PWD/runs:/work/runs" mtp-lightning train run_dir=runs/mine
ARG TORCH=cpu

FROM python:3.11-slim AS build
ARG TORCH
# The layers in C++ are built where there is a compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /venv
# PyPI's torch for Linux brings CUDA; the wheels for CPUs are a tenth of its size.
RUN if [ "$TORCH" = cpu ]; then \
      /venv/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu; \
    elif [ "$TORCH" != cuda ]; then echo "TORCH=$TORCH: cpu or cuda" >&2; exit 1; fi
RUN /venv/bin/pip install --no-cache-dir '.[report,hf]'

FROM python:3.11-slim
# torch.compile's, for compile=true
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["mtp-lightning"]
CMD ["--help"]
