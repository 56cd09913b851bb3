# Trains, evaluates, exports and serves on CPUs; torch without its 3 GB for GPUs:
#   docker build -f docker/cpu.Dockerfile -t paqdetr:cpu .
#   docker run --shm-size=8g -v ./data:/data:ro -v ./runs:/runs paqdetr:cpu train paq_dino_nano --data /data --output /runs/one
FROM python:3.13-slim
RUN pip install --no-cache-dir uv && uv pip install --no-cache --system --torch-backend cpu torch torchvision
WORKDIR /build
COPY . .
RUN pip install --no-cache-dir '.[export,serve,hub,video]'
RUN useradd --uid 1000 --create-home --home-dir /app paqdetr
USER 1000
WORKDIR /app
# Kernels are compiled once, here, and not by every container that starts.
ENV NUMBA_CACHE_DIR=/app/.numba PYTHONUNBUFFERED=1
RUN python -c "import numpy, paqdetr; paqdetr.create_model('paq_dino_nano').eval().predict(numpy.zeros((320, 320, 3), numpy.uint8))"
EXPOSE 8080
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "paqdetr"]
CMD ["--help"]
