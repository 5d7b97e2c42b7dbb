"""What every row of the zoo promises: Keras's own preprocessing, cuts that change nothing, a graph that saves, and the
whole way to the servers: head, SavedModel, TensorFlow's C++ loader, OpenVINO.
"""

import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images
from tensorflow.core.protobuf import saved_model_pb2

from tests.conftest import release_memory
from tl_keras.backbones.cut import cut, list_cuts
from tl_keras.backbones.engines import EngineChoice, build_engine, has_bfloat16, mean_cosine
from tl_keras.backbones.zoo import BACKBONES, build_backbone
from tl_keras.classifier import Classifier
from tl_keras.export.cpp_loader import find_libraries
from tl_keras.export.parity import ParityProcess
from tl_keras.export.saved_model import write_version
from tl_keras.report.gradcam import choose_map
from tl_keras.serving.graphs import as_strings
from tl_keras.serving.openvino_graph import OpenVinoGraph
from tl_keras.training.heads import attach, build_head

# One of each family; the others are the same code with other numbers.
FAST = {
    "VGG16",
    "ResNet50",
    "ResNet50V2",
    "InceptionV3",
    "Xception",
    "DenseNet121",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "NASNetMobile",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "ConvNeXtTiny",
    "SmallConvNet",
}
# of each kind of block one network, but for the two that take longest; all of FAST are exported
LIGHT = {"VGG16", "ResNet50", "MobileNetV2", "MobileNetV3Small", "EfficientNetV2B0", "ConvNeXtTiny", "SmallConvNet"}
PRESETS = [
    pytest.param(preset, id=name, marks=() if name in FAST else pytest.mark.slow) for name, preset in BACKBONES.items()
]
BY_BLOCK = [
    pytest.param(*param.values, id=param.id, marks=() if param.id in LIGHT else pytest.mark.slow) for param in PRESETS
]
# building an engine and saving take longest; every family's exported graph runs in TensorFlow's own below
ENGINES = {"MobileNetV3Small", "SmallConvNet"}
WITH_ENGINE = [
    pytest.param(*param.values, id=param.id, marks=() if param.id in ENGINES else pytest.mark.slow) for param in PRESETS
]
SERVED = [
    pytest.param(*param.values, id=param.id, marks=() if param.id == "EfficientNetB0" else pytest.mark.slow)
    for param in PRESETS
]
LABELS = ("a", "b", "c")
KERAS_PRESETS = [param for param in PRESETS if param.values[0].imagenet]
KERAS_BY_BLOCK = [param for param in BY_BLOCK if param.values[0].imagenet]


class Built:
    """A preset's backbone at the smallest size, two photographs, and what it makes of them."""

    def __init__(self, preset):
        size = preset.min_image_size
        self.preset = preset
        self.backbone = build_backbone(preset, weights="none", image_size=size)
        photographs = np.stack(load_sample_images().images)[:, ::4, ::4][:, 10 : 10 + size, 40 : 40 + size]
        self.images = photographs.astype("float32")
        for _ in range(10):
            if not self.amplifies_rounding():
                break
            self.damp()
        else:
            pytest.fail("this network of random weights can't be compared")

    def amplifies_rounding(self):
        """A deep network of random weights may turn the smallest change of its input into a different output."""
        both = self.backbone(np.concatenate([self.images, self.images * np.float32(1 + 1e-6)])).numpy()
        self.embeddings, nearby = np.split(both, 2)
        return np.abs(nearby - self.embeddings).max() > 1e-3 * np.ptp(self.embeddings, axis=0).max()

    def damp(self):
        """Makes the branches beside the shortcuts weaker."""
        for layer in self.backbone.layers:
            if isinstance(layer, keras.layers.BatchNormalization) and layer.scale:
                layer.gamma.assign(layer.gamma * 0.7)


@pytest.fixture(scope="module")
def built(request):
    keras.utils.set_random_seed(0)
    yield Built(request.param)
    release_memory()


def assert_same(actual, expected):
    """Equal but for the rounding of another order of operations, in proportion to the values' own size."""
    assert np.std(expected) > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def keras_functions(name):
    """The network's constructor and `preprocess_input`, as keras.applications has them."""
    constructor = getattr(keras.applications, name)
    return constructor, inspect.getmodule(constructor).preprocess_input


def test_no_network_of_keras_is_missing():
    networks = {name for name in dir(keras.applications) if inspect.isfunction(getattr(keras.applications, name))}
    assert {name for name, preset in BACKBONES.items() if preset.imagenet} == networks
    assert set(BACKBONES) - networks == {"SmallConvNet"}


@pytest.mark.parametrize("built", BY_BLOCK, indirect=True)
def test_graph_is_flat_and_named(built):
    backbone = built.backbone
    names = [layer.name for layer in backbone.layers]
    # ConvNeXt's own stem and downsampling layers are Sequentials of two layers: its weights files are made so.
    assert all(type(layer) is keras.Sequential for layer in backbone.layers if isinstance(layer, keras.Model))
    assert all(
        layer.name.startswith("convnext") and len(layer.layers) == 2
        for layer in backbone.layers
        if isinstance(layer, keras.Sequential)
    )
    assert backbone.name == built.preset.name
    assert names[0] == backbone.inputs[0].name == "images"
    assert ("preprocessing" in names) == (built.preset.preprocessing != "inside")
    assert isinstance(backbone.get_layer("embedding_pool"), keras.layers.GlobalAveragePooling2D)
    assert names[-1] == "embedding_pool" or names[-2] == "embedding_pool" and "ConvNeXt" in backbone.name
    assert backbone.inputs[0].dtype == "float32"
    assert backbone.output_shape == (None, built.embeddings.shape[1])


@pytest.mark.parametrize("built", KERAS_BY_BLOCK, indirect=True)
def test_embeddings_are_those_of_keras_applications(built):
    constructor, preprocess_input = keras_functions(built.preset.name)
    size = built.preset.min_image_size
    network = constructor(include_top=False, weights=None, pooling="avg", input_shape=(size, size, 3))
    network.set_weights(built.backbone.get_weights())
    assert_same(built.embeddings, network(preprocess_input(built.images.copy())).numpy())


@pytest.mark.parametrize("built", BY_BLOCK, indirect=True)
def test_tail_of_trunk_is_the_backbone_at_each_documented_cut(built):
    cuts = list_cuts(built.backbone)
    assert [name for name in cuts if name in built.preset.cuts] == list(built.preset.cuts)
    for at in built.preset.cuts:
        trunk, tail = cut(built.backbone, at=at)
        assert_same(tail(trunk(built.images)).numpy(), built.embeddings)


@pytest.mark.parametrize("built", BY_BLOCK, indirect=True)
def test_a_heat_map_has_somewhere_to_look(built):
    at = choose_map(built.backbone)
    trunk, _ = cut(built.backbone, at=at)
    assert min(trunk.output_shape[1:3]) >= 2
    names = [operation.name for operation in built.backbone.operations]
    if not built.preset.name.startswith("NASNet"):  # whose cells take two inputs: it can be cut at its end alone
        assert names.index(at) >= 0.5 * len(names)  # deep; at the smallest size the last maps have one pixel


@pytest.mark.parametrize("engine", ["tensorflow", "openvino"])
@pytest.mark.parametrize("built", WITH_ENGINE, indirect=True)
def test_an_engine_gives_the_backbones_embeddings(built, engine):
    images = built.images.astype(np.uint8)
    exact = build_engine(EngineChoice(engine, "float32", ""), built.backbone, batch_size=4)
    (embeddings,) = exact.run(images)
    assert_same(embeddings, built.embeddings)
    if has_bfloat16():
        (rounded,) = exact.at("bfloat16").run(images)
        assert 0.99 <= mean_cosine(rounded, built.embeddings) < 1


@pytest.mark.parametrize("built", WITH_ENGINE, indirect=True)
def test_saved_backbone_loads_and_gives_the_same(built, tmp_path):
    built.backbone.save(tmp_path / "backbone.keras")
    loaded = keras.saving.load_model(tmp_path / "backbone.keras")
    assert [operation.name for operation in loaded.operations] == [
        operation.name for operation in built.backbone.operations
    ]
    assert_same(loaded(built.images).numpy(), built.embeddings)


def add_head(backbone, embeddings):
    """A classifier of random weights whose probabilities differ from image to image, and these probabilities."""
    head = build_head(backbone.output_shape[1], len(LABELS), dropout=0, standardize=None)
    # random networks tell images hardly apart: the first class's logit is the distance along their difference
    kernel, difference = np.zeros(head.layers[-1].kernel.shape), embeddings[0] - embeddings[1]
    kernel[:, 0] = difference / (difference**2).sum()
    head.layers[-1].kernel.assign(kernel)
    head.layers[-1].bias.assign([-float(embeddings.mean(0) @ kernel[:, 0]), 0, 0])
    expected = tf.nn.softmax(head(embeddings)).numpy()
    network = attach(head, backbone)
    return Classifier(network, "toy", LABELS, backbone.name, backbone.layers[-1].name, "squash"), expected


@pytest.fixture(scope="module")
def exported(built, tmp_path_factory):
    """A row's version folder, two encoded photographs, and what the Keras network makes of them."""
    (classifier, expected), folder = add_head(built.backbone, built.embeddings), tmp_path_factory.mktemp("model") / "1"
    folder.mkdir()
    write_version(classifier, folder, name="toy", max_pixels=10**6)
    return folder, [tf.io.encode_png(image.astype("uint8")).numpy() for image in built.images], expected


@pytest.mark.parametrize("built", PRESETS, indirect=True)
def test_tensorflows_own_loader_gives_the_probabilities_of_keras(built, exported):
    folder, images, expected = exported
    assert np.ptp(expected, axis=0).max() > 0.01
    with ParityProcess() as fresh:
        agreement = fresh.compare(folder, images, expected)
    assert agreement.loader == ("C++" if find_libraries() else "TF1 session")
    assert agreement.decisions == 1
    assert agreement.largest_difference < 1e-3
    assert agreement.batch_difference < 1e-3


@pytest.mark.parametrize("built", SERVED, indirect=True)
def test_openvino_serves_the_probabilities_of_keras(built, exported):
    folder, images, expected = exported
    served = OpenVinoGraph(folder, precision="float32")
    answer = served.run("serving_default", {"image_bytes": as_strings([*images, b"no image"])})
    served.close()
    np.testing.assert_allclose(answer["probabilities"][:2], expected, atol=1e-3, equal_nan=False)
    assert answer["valid"].tolist() == [True, True, False]


@pytest.mark.parametrize("built", [param for param in PRESETS if param.id == "VGG16"], indirect=True)
def test_the_decoder_is_in_the_graph_once(built, exported):
    model = saved_model_pb2.SavedModel.FromString((exported[0] / "saved_model.pb").read_bytes())
    assert len(model.meta_graphs[0].graph_def.library.function) < 100  # 335 where each signature traces its own


@pytest.mark.parametrize("built", [param for param in PRESETS if param.id == "VGG16"], indirect=True)
def test_large_weights_are_in_the_model_once_for_all_signatures(built, exported):
    folder = exported[0]
    graph = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    # a session copies constants for each signature that runs
    assert max(node.attr["value"].tensor.ByteSize() for node in nodes if node.op == "Const") <= 2**16 + 100
    kernels = [weight for weight in built.backbone.weights if np.prod(weight.shape) * 4 > 2**16]
    assert sum(node.op == "VarHandleOp" for node in nodes) == len(kernels)
    stored = sum(path.stat().st_size for path in (folder / "variables").iterdir())
    assert stored == pytest.approx(4 * built.backbone.count_params(), rel=0.01)


@pytest.mark.parametrize("preset", KERAS_BY_BLOCK)
def test_image_size_is_the_networks_own(preset, monkeypatch):
    constructor, _ = keras_functions(preset.name)
    size = constructor(weights=None, classes=2).input_shape[1]
    if size is None:  # MobileNetV3 takes any size by default; its weights file is named after the one it was made for
        monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", refuse)
        with pytest.raises(ConnectionError) as error:
            constructor(weights="imagenet")
        size = int(re.search(r"_(\d{3})_", str(error.value))[1])
    assert size == preset.image_size


def refuse(url, *_):
    raise ConnectionError(url)


@pytest.mark.parametrize("preset", KERAS_PRESETS)
def test_smallest_image_size_is_the_networks_own(preset):
    constructor, _ = keras_functions(preset.name)
    size = preset.min_image_size - 1
    with pytest.raises(ValueError, match=f"at least {preset.min_image_size}"):
        constructor(include_top=False, weights=None, input_shape=(size, size, 3))
