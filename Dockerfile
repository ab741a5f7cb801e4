# One image for every process; the command says which. The lists in requirements/ are complete and hashed.
FROM python:3.11-slim AS build
WORKDIR /build
# This list also has the build backend.
COPY requirements/client.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/client.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels .

FROM python:3.11-slim
COPY requirements/runtime.txt /tmp/
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement /tmp/runtime.txt
COPY --from=build /build/wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps /tmp/wheels/*.whl \
    && useradd --system --create-home --home-dir /var/lib/cellway cellway
USER cellway
VOLUME /var/lib/cellway
ENTRYPOINT ["cellway"]
CMD ["--help"]
