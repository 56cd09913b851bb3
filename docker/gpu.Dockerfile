# The same on NVIDIA's GPUs; torch's own wheels bring CUDA:
#   docker build -f docker/gpu.Dockerfile -t paqdetr:gpu .
#   docker run --gpus all --shm-size=8g -v ./data:/data:ro -v ./runs:/runs paqdetr:gpu train paq_dino_r50 --data /data --output /runs/one
FROM python:3.13-slim
# Triton, which torch brings along, compiles its launcher with it: without one the kernels of attention are never used.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch torchvision
WORKDIR /build
COPY . .
RUN pip install --no-cache-dir '.[export,serve,hub,video]'
RUN useradd --uid 1000 --create-home --home-dir /app paqdetr
USER 1000
WORKDIR /app
ENV NUMBA_CACHE_DIR=/app/.numba PYTHONUNBUFFERED=1
RUN python -c "import numpy, paqdetr; paqdetr.create_model('paq_dino_nano').eval().predict(numpy.zeros((320, 320, 3), numpy.uint8))"
EXPOSE 8080
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "paqdetr"]
CMD ["--help"]
