# Serves an exported model on a CPU, without torch:
#   docker build -f docker/runtime.Dockerfile -t paqdetr:runtime .
#   docker run -p 8080:8080 -v ./model.onnx:/model/model.onnx:ro paqdetr:runtime
FROM python:3.13-slim AS build
WORKDIR /build
COPY . .
RUN pip install --no-cache-dir --no-compile --target /site -r docker/runtime-requirements.txt
RUN pip install --no-cache-dir --no-compile --no-deps --target /site .

FROM python:3.13-slim
COPY --from=build /site /site
ENV PYTHONPATH=/site PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --create-home --home-dir /app paqdetr
USER 1000
WORKDIR /app
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["python", "-m", "paqdetr"]
CMD ["serve", "/model/model.onnx", "--host", "0.0.0.0"]
