"""The warm-up file, read back as TF Serving reads it; that it is answered is tests/serving's to show."""

from __future__ import annotations

import tensorflow as tf

from tl_keras.data.images import decode
from tl_keras.export.warmup import BATCH_SIZES, make_photograph, read_warmup, write_warmup

SIGNATURES = ("serving_default", "pixels", "embeddings", "classify")


def test_there_is_a_request_for_each_signature_and_batch_size(tmp_path):
    write_warmup(tmp_path, "model", image_size=16)
    path = tmp_path / "assets.extra" / "tf_serving_warmup_requests"
    assert path.stat().st_size < 2_000_000
    requests = read_warmup(tmp_path)
    assert len(requests) == len(SIGNATURES) * len(BATCH_SIZES) <= 1000
    found = set()
    for log in requests:
        if log.WhichOneof("log_type") == "classify_log":
            request = log.classify_log.request
            size = len(request.input.example_list_with_context.examples)
        else:
            request = log.predict_log.request
            (tensor,) = request.inputs.values()
            array = tf.make_ndarray(tensor)
            size = len(array)
            assert array.shape == ((size, 16, 16, 3) if request.model_spec.signature_name == "pixels" else (size,))
        assert request.model_spec.name == "model"
        found.add((request.model_spec.signature_name, size))
    assert found == {(name, size) for name in SIGNATURES for size in BATCH_SIZES}


def test_the_photograph_is_one_that_can_be_decoded_and_never_another():
    assert make_photograph() == make_photograph()
    assert decode(tf.constant(make_photograph()), image_size=32, resize="crop").numpy().std() > 5


def test_a_model_without_the_file_has_no_requests(tmp_path):
    assert read_warmup(tmp_path) == []
