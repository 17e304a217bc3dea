# The gateway and its engine in one image, with the command that the tests run. Its build was not run here.
#
#   docker build -t aligned .
#   docker run --rm -p 127.0.0.1:8000:8000 -e LAB_API_KEYS=$(python -c 'import secrets; print(secrets.token_urlsafe(32))') \
#     -v $PWD/runs/cpu/dpo:/models/dpo:ro -v aligned-store:/store aligned --model /models/dpo
#
# A container must listen on all its addresses, so it needs LAB_API_KEYS. TLS is the work of a proxy before it.
FROM python:3.11-slim

WORKDIR /app
COPY requirements.txt ./
RUN grep -E '^(torch|transformers|accelerate|fastapi|uvicorn|httpx|prometheus-client|openai)==' requirements.txt \
      > serving.txt && pip install --no-cache-dir -r serving.txt
COPY deploy/serving ./deploy/serving
RUN useradd --create-home server && mkdir /store && chown server /store
USER server
ENV HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
VOLUME /store
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "deploy.serving", "--host", "0.0.0.0", "--port", "8000", "--store", "/store/serving.sqlite"]
