# The command line and the local server:
#   docker build --tag tl_keras .
#   docker run --rm --volume "$PWD:/work" tl_keras finetune --dataset=folder:photos
#   docker run --rm --volume "$PWD:/work" --publish 8501:8501 tl_keras serve --classifier=runs/photos --host=0.0.0.0
FROM python:3.13-slim
COPY setup.cfg pyproject.toml README.md LICENSE /source/
COPY tl_keras /source/tl_keras
RUN pip install --no-cache-dir '/source[openvino,serving]' && rm -r /source
ENV XDG_CACHE_HOME=/work/.cache KERAS_HOME=/work/.cache/keras
WORKDIR /work
ENTRYPOINT ["tl_keras"]
CMD []
