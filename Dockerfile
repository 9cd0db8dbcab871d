# docker build -t refold . && docker run --rm refold
FROM python:3.13-slim
WORKDIR /refold
COPY . .
RUN pip install --no-cache-dir .
WORKDIR /work
ENTRYPOINT ["refold"]
CMD ["quickstart"]
