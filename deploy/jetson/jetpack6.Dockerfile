# syntax=docker/dockerfile:1
# hkd-det on a Jetson with JetPack 6 (L4T r36: TensorRT 10.3, CUDA 12.6, Python 3.10). Run on the board, in the root
# of the repository:
#   docker build -f deploy/jetson/jetpack6.Dockerfile -t hkd-det:jetpack6 .
#   docker run --rm --runtime nvidia --group-add video -v "$PWD":/data hkd-det:jetpack6 hkd-export student.onnx --trt
# TensorRT runs engines on the GPU. ONNX files run on the CPU, unless ONNXRUNTIME_INDEX is the address of the package
# index with NVIDIA's onnxruntime-gpu for JetPack 6: see docs/how-to/deploy-containers.md.
ARG L4T_JETPACK=r36.4.0
FROM nvcr.io/nvidia/l4t-jetpack:${L4T_JETPACK}
ARG ONNXRUNTIME_INDEX
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE datasets.yaml ./
COPY hkd_det/ hkd_det/
COPY deploy/hkd_deploy/ deploy/hkd_deploy/
COPY deploy/systemd/ deploy/systemd/
COPY recipes/onnx/ recipes/onnx/
COPY benchmarks/hkd_bench/ benchmarks/hkd_bench/
# trackers requires opencv-python, which needs libGL: only the headless package is kept.
# --system-site-packages: no package index has the tensorrt package of JetPack.
RUN python3 -m venv --system-site-packages /opt/hkd \
    && /opt/hkd/bin/pip install --no-cache-dir --upgrade 'pip>=24' \
    && /opt/hkd/bin/pip install --no-cache-dir '.[cpu,tensorrt,bench,live,track,mqtt,metrics,web]' 'cuda-python<13' \
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
