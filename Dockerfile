# The gateway and its engine in one image, with the command that the tests run. Its build was not run here.
#
#   docker build -t aligned .
#   (umask 077; python3 -c 'import secrets; print("LAB_API_KEYS=" + secrets.token_urlsafe(32))' | tee serving.env)
#   docker run --rm -p 127.0.0.1:8000:8000 --env-file serving.env \
#     -v $PWD/runs/cpu/dpo:/models/dpo:ro -v aligned-store:/store aligned --model /models/dpo
#
# The second command shows the key, this once, and keeps it in a file that only you can read: no command line
# has it, so `ps` does not show it. Whoever may use docker on the machine can read it with `docker inspect`.
# A container must listen on all its addresses, so it needs LAB_API_KEYS. TLS is the work of a proxy before it.
# python:3.11-slim, Python 3.11.16, for all its processors. The digest was read from other projects that pin it, not
# pulled here; `docker buildx imagetools inspect python:3.11-slim` prints today's.
FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7

WORKDIR /app
COPY requirements.txt constraints.txt ./
RUN grep -E '^(torch|transformers|accelerate|fastapi|uvicorn|httpx|prometheus-client|openai)==' requirements.txt \
      > serving.txt && pip install --no-cache-dir -r serving.txt -c constraints.txt
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
