# pagedkv serve on a CPU:
#
#     docker build -t pagedkv .
#     docker run -p 8000:8000 -e PAGEDKV_API_KEYS=secret -v chats:/var/cache/pagedkv pagedkv
#
# Compiled code belongs to a kind of processor: build on the kind that will run it.
FROM python:3.13-slim AS build

RUN python -m venv /opt/pagedkv
ENV PATH=/opt/pagedkv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
# The wheel of PyPI brings CUDA, several GB of it; that of this index is for CPUs.
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt '.[serve,events,resp]' && pagedkv warmup

FROM python:3.13-slim

RUN useradd --system --create-home pagedkv && install -d -o pagedkv -g pagedkv -m 0700 /var/cache/pagedkv
COPY --from=build /opt/pagedkv /opt/pagedkv
ENV PATH=/opt/pagedkv/bin:$PATH
USER pagedkv
VOLUME /var/cache/pagedkv
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=15s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["pagedkv"]
CMD ["serve", "--host", "0.0.0.0", "--disk", "/var/cache/pagedkv/chats", "--disk-size", "4GB"]
