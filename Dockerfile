# docker build -t mtp-lightning .                          for CPUs
# docker build --build-arg TORCH=cuda -t mtp-lightning .   for GPUs; docker run --gpus all ..
# docker run --rm --user "$(id -u)" -v "$PWD/runs:/work/runs" mtp-lightning train run_dir=runs/mine
# docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs:/work/runs:ro" mtp-lightning serve checkpoint=runs/mine host=0.0.0.0
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
RUN /venv/bin/pip install --no-cache-dir '.[report,hf,serve]'

FROM python:3.11-slim
# torch.compile's, for compile=true
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH HOME=/home/mtp
# Whoever it runs as (--user) may write here: into the home the cache, into /work the runs.
RUN useradd --create-home mtp && mkdir /work && chmod 1777 /home/mtp /work
USER mtp
WORKDIR /work
EXPOSE 8000
# Of a server only: a training run has nothing that answers.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request as r; 'serve' in open('/proc/1/cmdline').read().split('\\0') and r.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["mtp-lightning"]
CMD ["--help"]
