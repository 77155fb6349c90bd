# blockd in a container: images, sockets and nothing else are in /images.
#
#   docker build -t blockd .
#   docker run --rm -v "$PWD:/images" --user "$(id -u):$(id -g)" blockd --device vda=disk.qcow2

FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY blockd ./blockd
RUN python -m venv /opt/blockd
RUN /opt/blockd/bin/pip install --no-cache-dir --disable-pip-version-check .
RUN /opt/blockd/bin/pip uninstall --yes pip

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home blockd \
    && install --directory --owner blockd /images
# The official image comes without compiled modules, and our user could not keep any: each start would compile.
RUN python -m compileall -q "$(python -c 'import os; print(os.path.dirname(os.__file__))')"
COPY --from=build /opt/blockd /opt/blockd
ENV PATH="/opt/blockd/bin:$PATH"
USER blockd
WORKDIR /images
VOLUME /images
# Fails until the daemon answers on ./blockd.qmp, which is where it listens unless told otherwise.
HEALTHCHECK --interval=30s --timeout=5s CMD ["blockctl", "list"]
ENTRYPOINT ["blockd"]
CMD ["--help"]
