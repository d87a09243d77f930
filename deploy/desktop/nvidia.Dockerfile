# syntax=docker/dockerfile:1
# hkd-det on an NVIDIA GPU: TensorRT and CUDA from NVIDIA's image, ONNX Runtime for CUDA. From the repository's root:
#   docker build -f deploy/desktop/nvidia.Dockerfile -t hkd-det:nvidia .
#   docker run --rm --gpus all -v "$PWD":/data hkd-det:nvidia hkd-export student.onnx --trt
# Python, CUDA and TensorRT come with the image. ONNX Runtime must be of the same CUDA: see docs/deploy/containers.md.
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:25.06-py3
FROM ${TENSORRT_IMAGE}
ARG ONNXRUNTIME_GPU="onnxruntime-gpu>=1.22,<1.27"
WORKDIR /src
COPY pyproject.toml README.md LICENSE datasets.yaml ./
COPY hkd_det/ hkd_det/
COPY deploy/hkd_deploy/ deploy/hkd_deploy/
COPY benchmarks/hkd_bench/ benchmarks/hkd_bench/
# --system-site-packages: the image's own tensorrt is the one that fits its libraries.
RUN python3 -m venv --system-site-packages /opt/hkd \
    && /opt/hkd/bin/pip install --no-cache-dir '.[gpu,tensorrt]' "${ONNXRUNTIME_GPU}" 'cuda-python<13'
RUN useradd --uid 10001 --create-home hkd && install -d -o hkd /data
ENV PATH=/opt/hkd/bin:$PATH
USER 10001
WORKDIR /data
CMD ["hkd-demo", "--help"]
