# syntax=docker/dockerfile:1
# hkd-det on an NVIDIA GPU: TensorRT and CUDA of NVIDIA's image, ONNX Runtime for CUDA. Run in the root of the repository:
#   docker build -f deploy/desktop/nvidia.Dockerfile -t hkd-det:nvidia .
#   docker run --rm --gpus all -v "$PWD":/data hkd-det:nvidia hkd-export student.onnx --trt
# The image contains Python, CUDA and TensorRT. ONNX Runtime must support its CUDA version: see docs/how-to/deploy-containers.md.
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:25.06-py3
FROM ${TENSORRT_IMAGE}
ARG ONNXRUNTIME_GPU="onnxruntime-gpu>=1.22,<1.27"
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
    && /opt/hkd/bin/pip install --no-cache-dir '.[gpu,tensorrt,bench,live,track,mqtt,metrics,web]' "${ONNXRUNTIME_GPU}" 'cuda-python<13' \
    && /opt/hkd/bin/pip uninstall -y opencv-python opencv-python-headless \
    && /opt/hkd/bin/pip install --no-cache-dir opencv-python-headless
RUN useradd --uid 10001 --create-home hkd && install -d -o hkd /data
ENV PATH=/opt/hkd/bin:$PATH
USER 10001
# A command without --heartbeat /tmp/alive is healthy while it runs.
HEALTHCHECK --interval=30s --start-period=5m CMD test ! -e /tmp/alive || test -n "$(find /tmp/alive -mmin -1)"
WORKDIR /data
CMD ["hkd-demo", "--help"]
