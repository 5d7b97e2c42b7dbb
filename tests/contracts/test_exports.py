"""Every row of the zoo survives the whole way: head, freezing, SavedModel, TensorFlow's C++ loader, OpenVINO."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images
from tensorflow.core.protobuf import saved_model_pb2

from tests.contracts.test_backbones import PRESETS
from tl_keras.backbones.zoo import BACKBONES, build_backbone
from tl_keras.classifier import Classifier
from tl_keras.export.cpp_loader import find_libraries
from tl_keras.export.parity import ParityProcess
from tl_keras.export.saved_model import write_version
from tl_keras.serving.engines import OpenVinoGraph
from tl_keras.serving.graphs import Graph, as_strings
from tl_keras.training.heads import attach, build_head

LABELS = ("a", "b", "c")
# that OpenVINO takes each family's network is test_backbones.py's; here it is given the exported graph
SERVED = [
    pytest.param(preset, id=name, marks=() if name == "EfficientNetB0" else pytest.mark.slow)
    for name, preset in BACKBONES.items()
]


def build_untrained(preset, images):
    """A classifier of random weights whose probabilities differ from image to image."""
    keras.utils.set_random_seed(0)
    backbone = build_backbone(preset, weights="none", image_size=preset.min_image_size)
    embeddings = backbone(images).numpy()
    head = build_head(backbone.output_shape[1], len(LABELS), dropout=0, standardize=None)
    # random networks tell images hardly apart: the first class's logit is the distance along their difference
    kernel, difference = np.zeros(head.layers[-1].kernel.shape), embeddings[0] - embeddings[1]
    kernel[:, 0] = difference / (difference**2).sum()
    head.layers[-1].kernel.assign(kernel)
    head.layers[-1].bias.assign([-float(embeddings.mean(0) @ kernel[:, 0]), 0, 0])
    return Classifier(attach(head, backbone), "toy", LABELS, preset.name, backbone.layers[-1].name, "squash")


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """A row's version folder, two photographs, and what the Keras network makes of them."""
    preset, folder = request.param, tmp_path_factory.mktemp("model") / "1"
    size = preset.min_image_size
    photographs = np.stack(load_sample_images().images)[:, ::4, ::4][:, 10 : 10 + size, 40 : 40 + size]
    classifier = build_untrained(preset, photographs.astype("float32"))
    expected = tf.nn.softmax(classifier.network(photographs.astype("float32"))).numpy()
    folder.mkdir()
    write_version(classifier, folder, name="toy", max_pixels=10**6)
    yield folder, [tf.io.encode_png(image).numpy() for image in photographs], expected
    keras.backend.clear_session()


@pytest.mark.parametrize("exported", PRESETS, indirect=True)
def test_tensorflows_own_loader_gives_the_probabilities_of_keras(exported):
    folder, images, expected = exported
    assert np.ptp(expected, axis=0).max() > 0.01
    with ParityProcess() as fresh:
        agreement = fresh.compare(folder, images, expected)
    assert agreement.loader == ("C++" if find_libraries() else "TF1 session")
    assert agreement.decisions == 1
    assert agreement.largest_difference < 1e-3
    assert agreement.batch_difference < 1e-3


@pytest.mark.parametrize("exported", SERVED, indirect=True)
def test_openvino_serves_the_probabilities_of_keras(exported):
    folder, images, expected = exported
    served = OpenVinoGraph(Graph(folder, precision="float32"), folder, LABELS, precision="float32")
    answer = served.run("serving_default", {"image_bytes": as_strings([*images, b"no image"])})
    served.close()
    np.testing.assert_allclose(answer["probabilities"][:2], expected, atol=1e-3)
    assert answer["valid"].tolist() == [True, True, False]


@pytest.mark.parametrize("exported", PRESETS[:1], indirect=True)
def test_the_decoder_is_in_the_graph_once(exported):
    model = saved_model_pb2.SavedModel.FromString((exported[0] / "saved_model.pb").read_bytes())
    assert len(model.meta_graphs[0].graph_def.library.function) < 100  # 335 where each signature traces its own
