"""Naive server as a baseline: FastAPI, with the SavedModel called once per request.

python -m benchmarks.naive_server FOLDER PORT
"""

from __future__ import annotations

import base64
import sys

import tensorflow as tf
import uvicorn
from fastapi import FastAPI

app = FastAPI()
model = tf.saved_model.load(sys.argv[1])
serve = model.signatures["serving_default"]


@app.post("/v1/models/{name}:predict")
def predict(name: str, body: dict) -> dict:
    del name
    images = [base64.b64decode(one["b64"]) for one in body["instances"]]
    answer = serve(image_bytes=tf.constant(images))
    rows = {key: value.numpy() for key, value in answer.items()}
    labels = [[label.decode() for label in row] for row in rows.pop("labels").tolist()]
    columns = {key: value.tolist() for key, value in rows.items()} | {"labels": labels}
    return {"predictions": [{key: value[row] for key, value in columns.items()} for row in range(len(images))]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="critical")
