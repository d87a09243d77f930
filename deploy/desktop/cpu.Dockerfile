# syntax=docker/dockerfile:1
# hkd-det on any processor, without torch. Run in the root of the repository:
#   docker build -f deploy/desktop/cpu.Dockerfile -t hkd-det:cpu .
#   docker run --rm -v "$PWD":/data hkd-det:cpu hkd-demo student.onnx --source street.mp4 --save out.mp4
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE datasets.yaml ./
COPY hkd_det/ hkd_det/
COPY deploy/hkd_deploy/ deploy/hkd_deploy/
COPY deploy/systemd/ deploy/systemd/
COPY benchmarks/hkd_bench/ benchmarks/hkd_bench/
RUN python -m venv /opt/hkd && /opt/hkd/bin/pip install --no-cache-dir '.[cpu]'

FROM python:3.12-slim-bookworm
COPY --from=build /opt/hkd /opt/hkd
RUN useradd --uid 10001 --create-home hkd && install -d -o hkd /data
ENV PATH=/opt/hkd/bin:$PATH
USER 10001
WORKDIR /data
CMD ["hkd-demo", "--help"]
