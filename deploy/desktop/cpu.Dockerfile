# syntax=docker/dockerfile:1
# hkd-det on any processor, without torch. Run in the root of the repository:
#   docker build -f deploy/desktop/cpu.Dockerfile -t hkd-det:cpu .
#   docker run --rm -v "$PWD":/data hkd-det:cpu hkd-demo student.onnx --source street.mp4 --save out.mp4
# A tag can change. Pin the base image by its digest: see docs/how-to/deploy-containers.md.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE datasets.yaml deploy/desktop/cpu.lock ./
COPY hkd_det/ hkd_det/
COPY deploy/hkd_deploy/ deploy/hkd_deploy/
COPY deploy/systemd/ deploy/systemd/
COPY recipes/onnx/ recipes/onnx/
COPY benchmarks/hkd_bench/ benchmarks/hkd_bench/
# `make lock` writes the lock file: hkd-bench, and hkd-demo on network cameras with tracking,
# MQTT, Prometheus and the page. --no-deps: trackers requires opencv-python, which needs libGL.
RUN python -m venv /opt/hkd \
    && /opt/hkd/bin/pip install --no-cache-dir --no-deps --require-hashes -r cpu.lock \
    && /opt/hkd/bin/pip install --no-cache-dir --no-deps .

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/hkd /opt/hkd
RUN useradd --uid 10001 --create-home hkd && install -d -o hkd /data
ENV PATH=/opt/hkd/bin:$PATH
USER 10001
# A command without --heartbeat /tmp/alive is healthy while it runs.
HEALTHCHECK --interval=30s --start-period=5m CMD test ! -e /tmp/alive || test -n "$(find /tmp/alive -mmin -1)"
WORKDIR /data
CMD ["hkd-demo", "--help"]
