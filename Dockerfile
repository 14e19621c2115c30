# Axolotl with emguard, from the wheel of this checkout:
#   docker build -t emguard .
#   docker run --gpus all -v "$PWD:/work" emguard axolotl train run.yaml
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY emguard_plugin emguard_plugin
COPY example_yamls example_yamls
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git && rm -rf /var/lib/apt/lists/*
COPY constraints/axolotl-0.21.txt /tmp/locked.txt
# torch by itself, since what it brings is not in the lock; then the lock, unresolved.
RUN pip install --no-cache-dir -c /tmp/locked.txt torch && grep -v '^torch==' /tmp/locked.txt > /tmp/rest.txt && pip install --no-cache-dir --no-deps -r /tmp/rest.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl && emguard --help > /dev/null && axolotl --help > /dev/null
WORKDIR /work
CMD ["emguard", "--help"]
