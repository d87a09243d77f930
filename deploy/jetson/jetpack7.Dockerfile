# syntax=docker/dockerfile:1
# hkd-det on a Jetson with JetPack 7 (L4T r38 and r39, CUDA 13, Python 3.12). Run on the board, in the root of the
# repository:
#   docker build -f deploy/jetson/jetpack7.Dockerfile -t hkd-det:jetpack7 .
#   docker run --rm --runtime nvidia --group-add video -v "$PWD":/data hkd-det:jetpack7 hkd-export student.onnx --trt
# JetPack 7 runs NVIDIA's regular arm64 images; there is no l4t-jetpack image for it. An engine opens only with the
# TensorRT version that built it: choose the tag with docs/how-to/deploy-containers.md, and build engines in this container.
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:25.11-py3
FROM ${TENSORRT_IMAGE}
ARG ONNXRUNTIME_INDEX
WORKDIR /src
COPY pyproject.toml README.md LICENSE datasets.yaml ./
COPY hkd_det/ hkd_det/
COPY deploy/hkd_deploy/ deploy/hkd_deploy/
COPY deploy/systemd/ deploy/systemd/
COPY recipes/onnx/ recipes/onnx/
COPY benchmarks/hkd_bench/ benchmarks/hkd_bench/
# trackers requires opencv-python, which needs libGL: only the headless package is kept.
# --system-site-packages: use the tensorrt package of the image, which fits its libraries.
RUN python3 -m venv --system-site-packages /opt/hkd \
    && /opt/hkd/bin/pip install --no-cache-dir '.[cpu,tensorrt,bench,live,track,mqtt,metrics,web]' 'cuda-python>=13,<14' \
    && /opt/hkd/bin/pip uninstall -y opencv-python opencv-python-headless \
    && /opt/hkd/bin/pip install --no-cache-dir opencv-python-headless
# --no-deps: the dependencies are installed, and pip would install a newer build without CUDA from PyPI.
RUN if [ -n "${ONNXRUNTIME_INDEX}" ]; then \
        /opt/hkd/bin/pip uninstall -y onnxruntime \
        && /opt/hkd/bin/pip install --no-cache-dir --no-deps --index-url "${ONNXRUNTIME_INDEX}" onnxruntime-gpu; \
    fi
# The group video has access to the GPU and cameras of a Jetson.
RUN useradd --uid 10001 --create-home --groups video hkd && install -d -o hkd /data
ENV PATH=/opt/hkd/bin:$PATH
USER 10001
# A command without --heartbeat /tmp/alive is healthy while it runs.
HEALTHCHECK --interval=30s --start-period=5m CMD test ! -e /tmp/alive || test -n "$(find /tmp/alive -mmin -1)"
WORKDIR /data
CMD ["hkd-demo", "--help"]
