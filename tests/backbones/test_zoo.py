"""The zoo: rows, names, what each kind of weights file gives, and every error a user can cause."""

import contextlib
import dataclasses
import inspect
import json
import pathlib
import socket
import subprocess
import sys
import urllib.error
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.backbones import zoo
from tl_keras.backbones.preprocessing import Preprocessing
from tl_keras.backbones.zoo import BACKBONES, build_backbone, find_preset
from tl_keras.errors import UserError

SMALL = BACKBONES["SmallConvNet"]
MOBILENET = BACKBONES["MobileNet"]
NARROW = {"alpha": 0.25}
IMAGES = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")


def user_error(preset, *, weights="none", image_size=None, kwargs=None):
    with pytest.raises(UserError) as error:
        build_backbone(preset, weights=str(weights), image_size=image_size or preset.image_size, kwargs=kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def build(preset, weights="none", kwargs=None):
    return build_backbone(preset, weights=str(weights), image_size=32, kwargs=kwargs)


def randomize(model):
    """Gives each variable values of its own: fresh networks have ones and zeros where a mix-up would not show."""
    generator = np.random.default_rng(1)
    for variable in model.weights:
        if variable.dtype == "float32":
            variable.assign(generator.uniform(0.1, 0.3, variable.shape))
    return model


def keras_mobilenet(**kwargs):
    """Keras's own MobileNet, and what it gives for IMAGES by its own preprocessing."""
    network = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), alpha=0.25, **kwargs)
    return randomize(network)


def embed(network):
    return network(keras.applications.mobilenet.preprocess_input(IMAGES.copy())).numpy()


def write_legacy(model, path):
    """Writes the layout of Keras 1 and 2, as the files of keras.applications have it, from a whole-model file."""
    whole = path.with_name("whole.h5")
    with contextlib.redirect_stderr(None):
        model.save(whole)
    with h5py.File(whole) as source, h5py.File(path, "w") as target:
        for name, group in source["model_weights"].items():
            source.copy(group, target, name)
        target.attrs.update(source["model_weights"].attrs)
    return path


# Rows and names.


def test_importing_the_zoo_loads_no_keras():
    code = "import sys, tl_keras.backbones.zoo; print({'keras', 'tensorflow', 'h5py'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_rows_are_complete_and_frozen():
    for preset in BACKBONES.values():
        assert preset.imagenet == preset.paper.rpartition(" ")[2].startswith("https://arxiv.org/abs/")
        assert preset.licence in {"MIT", "Apache-2.0", "BSD-3-Clause", "CC-BY-4.0"} or not preset.imagenet
        assert preset.min_image_size <= preset.image_size
        assert not preset.imagenet_sizes or preset.image_size in preset.imagenet_sizes
        assert set(preset.kwargs) <= set(zoo._KWARG_RULES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.image_size = 8


def test_kwargs_are_those_of_the_constructor_that_change_more_than_the_top():
    common = set(inspect.signature(keras.applications.ResNet50).parameters)
    top_only = {"dropout", "dropout_rate", "include_preprocessing"}
    for name, preset in BACKBONES.items():
        if preset.imagenet:
            own = set(inspect.signature(getattr(keras.applications, name)).parameters) - common - top_only
            assert set(preset.kwargs) == own


@pytest.mark.parametrize("name", ["ResNet50", "resnet50", "RESNET50"])
def test_preset_is_found_in_any_case(name):
    assert find_preset(name) is BACKBONES["ResNet50"]


def test_unknown_backbone_is_told_the_nearest():
    with pytest.raises(UserError) as error:
        find_preset("efficientnet_b0")
    assert str(error.value) == (
        "Unknown backbone 'efficientnet_b0'. Nearest: EfficientNetB0, EfficientNetV2B0, EfficientNetB7. "
        "Use a network of keras.applications, or SmallConvNet."
    )


def test_small_conv_net_has_the_layers_it_is_documented_with():
    backbone = build(SMALL)
    names = ["images", "preprocessing", "conv1", "pool1", "conv2", "pool2", "conv3", "embedding_pool"]
    assert [layer.name for layer in backbone.layers] == names
    assert backbone.output_shape == (None, 128)


def test_a_name_means_the_same_layer_in_every_process():
    first, second = (build(BACKBONES["MobileNetV3Small"]) for _ in range(2))
    names = [operation.name for operation in first.operations]
    assert names == [operation.name for operation in second.operations]
    assert {"activation", "activation_17", "add", "multiply"} <= set(names)


def test_numbering_anew_keeps_order_and_authors_names():
    outline = [
        ("Conv2D", "conv2d_9"),
        ("Conv2D", "conv2d_10"),
        ("Conv2D", "conv1"),
        ("Add", "add_3"),
        ("Add", "conv2d"),
    ]
    assert zoo._number_anew(outline) == ["conv2d", "conv2d_1", "conv1", "add", "conv2d"]


# Preprocessing.


@pytest.mark.parametrize("mode", ["caffe", "tf", "torch"])
def test_preprocessing_is_the_same_eagerly_and_in_tf_data(mode):
    layer = Preprocessing(mode)
    expected = keras.applications.imagenet_utils.preprocess_input(IMAGES.copy(), mode=mode)
    mapped = next(iter(tf.data.Dataset.from_tensors(IMAGES).map(layer)))
    np.testing.assert_allclose(layer(IMAGES), expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6, atol=1e-5)


def test_preprocessing_stays_in_float32_under_a_bfloat16_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert Preprocessing("tf")(IMAGES).dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


# Settings.


def test_too_small_an_image_is_told_the_smallest():
    assert user_error(BACKBONES["Xception"], image_size=70) == (
        "Xception does not support --image_size=70. Allowed: 71 or more. Its default is 299."
    )


def test_an_image_size_without_imagenet_weights_is_told_those_with():
    assert user_error(BACKBONES["MobileNetV2"], weights="imagenet", image_size=200) == (
        "MobileNetV2 has no ImageNet weights for --image_size=200. Allowed: 96, 128, 160, 192, 224. "
        "Use one of these, or --weights=FILE with the weights of another size."
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": 1}, "has no argument beta=1. Allowed: alpha, depth_multiplier."),
        ({"alpha": 0}, "does not support alpha=0. Allowed: a number above 0."),
        ({"alpha": True}, "does not support alpha=True. Allowed: a number above 0."),
        ({"alpha": float("nan")}, "does not support alpha=nan. Allowed: a number above 0."),
        ({"alpha": "x\ny"}, "does not support alpha='x\\ny'. Allowed: a number above 0."),
        ({"depth_multiplier": 1.5}, "does not support depth_multiplier=1.5. Allowed: a whole number of 1 or more."),
    ],
)
def test_wrong_arguments_are_told_what_is_allowed(kwargs, message):
    assert user_error(MOBILENET, kwargs=kwargs) == f"MobileNet {message} Correct --backbone_kwargs."


def test_an_argument_where_there_are_none():
    assert user_error(BACKBONES["ResNet50"], kwargs={"alpha": 0.5}) == (
        "ResNet50 has no argument alpha=0.5. It has no arguments. Correct --backbone_kwargs."
    )


def test_minimalistic_is_a_truth_value():
    message = user_error(BACKBONES["MobileNetV3Small"], kwargs={"minimalistic": 1})
    assert "does not support minimalistic=1. Allowed: True or False." in message


def test_arguments_reach_the_network():
    assert build(MOBILENET, kwargs={"alpha": 0.5}).output_shape == (None, 512)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("MobileNetV2", {"alpha": 0.4}, "with image_size=224, alpha=0.4: If imagenet weights are being loaded, alpha"),
        ("MobileNetV3Small", {"alpha": 0.75, "minimalistic": True}, "`1.0` for minimalistic only"),
        ("MobileNet", {"depth_multiplier": 2}, "depth multiplier must be 1"),
    ],
)
def test_arguments_without_imagenet_weights_are_told_keras_reason(name, kwargs, reason):
    message = user_error(BACKBONES[name], weights="imagenet", kwargs=kwargs)
    assert message.startswith(f"Keras can't build {name} with image_size=224, ")
    assert reason in message
    assert message.endswith(". Change --backbone_kwargs or --weights.")


# ImageNet weights, with the download replaced.


@pytest.fixture
def keras_home(tmp_path, monkeypatch):
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))  # KERAS_HOME, which is read at import
    return tmp_path


def replace_download(monkeypatch, download):
    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", download)


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs", "url", "file"),
    [
        (
            "MobileNetV2",
            96,
            {"alpha": 0.35},
            "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_96_no_top.h5",
            "",
        ),
        ("MobileNet", 128, {"alpha": 0.25}, "mobilenet/mobilenet_2_5_128_tf_no_top.h5", ""),
        ("NASNetMobile", 224, {}, "nasnet/NASNet-mobile-no-top.h5", "nasnet_mobile_no_top.h5"),
    ],
)  # fmt: skip
def test_offline_names_the_url_and_where_to_put_the_file(monkeypatch, keras_home, name, image_size, kwargs, url, file):
    def download(*_):
        raise urllib.error.URLError("Name or service not known")

    replace_download(monkeypatch, download)
    message = user_error(BACKBONES[name], weights="imagenet", image_size=image_size, kwargs=kwargs)
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/{url}"
    assert message == (
        f"Could not download the ImageNet weights of {name} from {url} (Name or service not known). "
        f"Download the file on a machine with internet access and save it as "
        f"{keras_home / 'models' / (file or pathlib.Path(url).name)}, or use --weights=none or --weights=FILE."
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.HTTPError("", 404, "Not Found", {}, None), "(404 -- Not Found)"),
        (TimeoutError("timed out"), "(timed out)"),
        (ConnectionResetError(104, "Connection reset by peer"), "([Errno 104] Connection reset by peer)"),
    ],
)
def test_a_download_that_breaks_off_gives_its_reason(monkeypatch, keras_home, error, reason):
    def download(*_):
        raise error

    replace_download(monkeypatch, download)
    assert reason in user_error(MOBILENET, weights="imagenet", kwargs=NARROW)


def test_a_stalled_connection_is_given_up_and_the_setting_put_back(monkeypatch, keras_home):
    def download(*_):
        raise TimeoutError(f"after {socket.getdefaulttimeout()}")

    replace_download(monkeypatch, download)
    assert f"(after {zoo.DOWNLOAD_STALL_SECONDS})" in user_error(MOBILENET, weights="imagenet", kwargs=NARROW)
    assert socket.getdefaulttimeout() is None


def test_a_download_with_the_wrong_hash(monkeypatch, keras_home):
    replace_download(monkeypatch, lambda url, path, _: pathlib.Path(path).write_bytes(b"half a file"))
    assert "(Incomplete or corrupted file detected." in user_error(BACKBONES["VGG16"], weights="imagenet")


def test_a_broken_file_where_keras_keeps_it(keras_home):
    (keras_home / "models").mkdir()
    (keras_home / "models" / "mobilenet_2_5_128_tf_no_top.h5").write_bytes(b"half a file")
    message = user_error(MOBILENET, weights="imagenet", image_size=128, kwargs=NARROW)
    assert message.startswith(
        "The ImageNet weights of MobileNet in the cache of Keras, ~/.keras/models (or $KERAS_HOME/"
    )
    assert message.endswith(". Delete the file; it will be downloaded again.")


def test_downloaded_weights_give_what_keras_gives(monkeypatch, keras_home):
    network = randomize(
        keras.applications.MobileNet(
            include_top=False, weights=None, input_shape=(128, 128, 3), alpha=0.25, pooling="avg"
        )
    )
    replace_download(monkeypatch, lambda url, path, _: write_legacy(network, pathlib.Path(path)))
    backbone = build_backbone(MOBILENET, weights="imagenet", image_size=128, kwargs=NARROW)
    images = np.random.default_rng(0).uniform(0, 255, (2, 128, 128, 3)).astype("float32")
    expected = network(keras.applications.mobilenet.preprocess_input(images.copy())).numpy()
    np.testing.assert_allclose(backbone(images), expected, rtol=1e-4)


def test_small_conv_net_has_no_imagenet_weights():
    assert user_error(SMALL, weights="imagenet") == (
        "SmallConvNet has no ImageNet weights. Allowed: --weights=none or --weights=FILE."
    )


# Weights files.


@pytest.mark.parametrize("layout", ["new.weights.h5", "old.h5", "whole.h5", "old_named_as.weights.h5", "model.keras"])
@pytest.mark.parametrize("top", [False, True])
def test_a_weights_file_of_any_layout_with_or_without_top(tmp_path, layout, top):
    network = keras_mobilenet(include_top=top, classes=7)
    path = tmp_path / layout
    if layout.startswith("old"):
        write_legacy(network, path)
    elif layout.startswith("new"):
        network.save_weights(path)
    else:
        network.save(path)
    backbone = build(MOBILENET, path, NARROW)
    last_map = network.get_layer("conv_pw_13_relu").output
    body = keras.Model(network.inputs, keras.layers.GlobalAveragePooling2D()(last_map))
    np.testing.assert_allclose(backbone(IMAGES), embed(body), rtol=1e-5)


def test_random_weights_differ_and_follow_keras_seed():
    keras.utils.set_random_seed(3)
    first, second = build(SMALL), build(SMALL)
    keras.utils.set_random_seed(3)
    third = build(SMALL)
    assert np.abs(first(IMAGES) - second(IMAGES).numpy()).max() > 0
    np.testing.assert_array_equal(first(IMAGES), third(IMAGES))


@pytest.mark.parametrize(
    "name", ["SmallConvNet", "MobileNetV3Small", pytest.param("EfficientNetB0", marks=pytest.mark.slow), "ConvNeXtTiny"]
)
@pytest.mark.parametrize("file", ["backbone.weights.h5", "backbone.h5", "backbone.keras"])
def test_what_a_backbone_saves_it_loads(tmp_path, name, file):
    saved = randomize(build(BACKBONES[name]))
    (saved.save_weights if "weights" in file else saved.save)(tmp_path / file)
    loaded = build(BACKBONES[name], tmp_path / file)
    for expected, actual in zip(saved.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_keras_model_around_the_backbone_with_a_head_of_its_own(tmp_path):
    backbone = randomize(build(MOBILENET, kwargs=NARROW))
    nested = keras.Sequential([keras.layers.RandomFlip(), backbone, keras.layers.Dense(4)])
    nested(IMAGES)
    flat = keras.Model(backbone.inputs, keras.layers.Dense(4)(backbone.outputs[0]))
    for i, model in enumerate((nested, flat)):
        model.save(tmp_path / f"{i}.keras")
        np.testing.assert_array_equal(build(MOBILENET, tmp_path / f"{i}.keras", NARROW)(IMAGES), backbone(IMAGES))


def test_names_that_keras_numbered_differently_still_match(tmp_path):
    keras.layers.Conv2D(1, 1), keras.layers.BatchNormalization()  # both now count from one more
    network = keras.applications.Xception(include_top=False, weights=None, input_shape=(71, 71, 3))
    assert network.get_layer(index=-1).name != "conv2d"
    network.save(tmp_path / "xception.keras")
    backbone = build_backbone(BACKBONES["Xception"], weights=str(tmp_path / "xception.keras"), image_size=71)
    for expected, actual in zip(network.weights, backbone.weights, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_layer_names_too_long_for_one_attribute_are_read_in_order(tmp_path):
    network = keras_mobilenet(include_top=False)
    path = write_legacy(network, tmp_path / "chunked.h5")
    with h5py.File(path, "a") as file:
        for i, chunk in enumerate(np.array_split(file.attrs["layer_names"], 12)):
            file.attrs[f"layer_names{i}"] = chunk
        del file.attrs["layer_names"]
    backbone = build(MOBILENET, path, NARROW)
    np.testing.assert_array_equal(backbone.get_layer("conv_pw_13").kernel, network.get_layer("conv_pw_13").kernel)


def test_efficientnet_weights_of_imagenet_give_the_same_by_path(tmp_path, monkeypatch):
    network = randomize(keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(32, 32, 3)))
    normalization = next(layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
    normalization.adapt_mean.assign([0.485, 0.456, 0.406])
    normalization.adapt_variance.assign([0.229, 0.224, 0.225])
    path = write_legacy(network, tmp_path / "efficientnetb0_notop.h5")
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *_, **__: str(path))
    downloaded, by_path = (build(BACKBONES["EfficientNetB0"], weights) for weights in ("imagenet", path))
    assert len(downloaded.layers) == len(by_path.layers) + 1  # the Rescaling that Keras adds
    np.testing.assert_allclose(by_path(IMAGES), downloaded(IMAGES), rtol=1e-4)
    by_path.save_weights(tmp_path / "again.weights.h5")
    again = build(BACKBONES["EfficientNetB0"], tmp_path / "again.weights.h5")
    np.testing.assert_array_equal(again(IMAGES), by_path(IMAGES))


@pytest.mark.parametrize("weights", ["imagenett", "no/such.h5", ".", "network.pth", ""])
def test_no_weights_file(weights):
    assert user_error(SMALL, weights=weights) == (
        f"--weights={weights!r} is not a weights file. Allowed: imagenet, none, a run folder, or an existing file with "
        "the suffix .h5, .hdf5, .keras. Check the path."
    )


def test_an_existing_file_of_another_kind(tmp_path):
    (tmp_path / "network.pth").write_bytes(b"PK")
    assert "is not a weights file" in user_error(SMALL, weights=tmp_path / "network.pth")


def zip_file(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)


@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("text.h5", lambda path: path.write_text("not HDF5")),
        ("empty.weights.h5", lambda path: path.write_bytes(b"")),
        ("text.keras", lambda path: path.write_text("not a zip")),
        ("other.keras", lambda path: zip_file(path, readme__txt="a zip of something else")),
        ("broken.keras", lambda path: zip_file(path, config__json="{")),
        ("weightless.keras", lambda path: zip_file(path, config__json=json.dumps({"config": {}}))),
        ("other.h5", lambda path: h5py.File(path, "w").create_dataset("x", data=[1]).file.close()),
    ],
)
def test_a_file_that_is_no_weights_file(tmp_path, file, write):
    write(tmp_path / file)
    message = user_error(SMALL, weights=tmp_path / file)
    assert message.startswith(f"The weights file {tmp_path / file} can't be read (")
    assert message.endswith(
        "). Allowed: complete .h5, .weights.h5 and .keras files written by Keras. Copy or download it again."
    )


@pytest.mark.parametrize("file", ["half.weights.h5", "half.keras"])
def test_a_truncated_file(tmp_path, file):
    backbone = build(SMALL)
    (backbone.save_weights if "weights" in file else backbone.save)(tmp_path / file)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    assert "can't be read (" in user_error(SMALL, weights=tmp_path / file)


@pytest.mark.parametrize("file", ["other.weights.h5", "other.h5", "other.keras"])
def test_the_weights_of_a_wider_network_name_the_first_layer_that_differs(tmp_path, file):
    other = build(MOBILENET, kwargs={"alpha": 0.5})
    (other.save_weights if "weights" in file else other.save)(tmp_path / file)
    assert user_error(MOBILENET, weights=tmp_path / file, kwargs=NARROW) == (
        f"The weights file {tmp_path / file} does not fit MobileNet: its layer 'conv1' needs shapes (3, 3, 3, 8), but "
        "the file has (3, 3, 3, 16). Use weights of this network, with the same --backbone_kwargs."
    )


@pytest.mark.parametrize("file", ["other.weights.h5", "other.h5", "other.keras"])
def test_the_weights_of_another_network(tmp_path, file):
    other = build(SMALL)
    (other.save_weights if "weights" in file else other.save)(tmp_path / file)
    message = user_error(BACKBONES["VGG16"], weights=tmp_path / file)
    assert (
        "does not fit VGG16: its layer 'block1_conv1' needs shapes (3, 3, 3, 64), (64,), but the file has " in message
    )


def test_a_network_that_ends_too_early(tmp_path):
    images = keras.Input((32, 32, 3))
    short = keras.Model(images, keras.layers.Conv2D(32, 3, name="conv1")(images))
    for file in ("short.weights.h5", "short.h5", "short.keras"):
        (short.save_weights if "weights" in file else short.save)(tmp_path / file)
        message = user_error(SMALL, weights=tmp_path / file)
        assert "its layer 'conv2' needs shapes (3, 3, 32, 64), (64,), but the file has none." in message


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    build(MOBILENET, kwargs={"alpha": 0.5}).save_weights(tmp_path / "other.weights.h5")
    backbone = build(MOBILENET, kwargs=NARROW)
    before = backbone.get_weights()
    with pytest.raises(UserError):
        zoo._load_weights_file(backbone, tmp_path / "other.weights.h5")
    for old, new in zip(before, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_vgg16_with_its_top_ends_in_fc2():
    vgg = BACKBONES["VGG16"]
    backbone = build_backbone(vgg, weights="none", image_size=32, with_top=True)
    assert backbone.output_shape == (None, 4096)
    assert [layer.name for layer in backbone.layers][-3:] == list(vgg.top) == ["flatten", "fc1", "fc2"]
    assert "embedding_pool" not in [layer.name for layer in backbone.layers]


def test_the_top_needs_imagenets_own_image_size():
    with pytest.raises(UserError) as error:
        build_backbone(BACKBONES["VGG16"], weights="imagenet", image_size=96, with_top=True)
    assert str(error.value) == (
        "the layers flatten, fc1, fc2 of VGG16 have ImageNet weights only for images of 224 x 224 pixels, not 96. "
        "Leave out --image_size, or use another layer."
    )


def test_a_weights_file_without_the_top_does_not_fit_the_network_with_it(tmp_path):
    vgg = BACKBONES["VGG16"]
    build_backbone(vgg, weights="none", image_size=32).save_weights(tmp_path / "notop.weights.h5")
    with pytest.raises(UserError, match="does not fit VGG16: its layer 'fc1' needs shapes"):
        build_backbone(vgg, weights=str(tmp_path / "notop.weights.h5"), image_size=32, with_top=True)
    whole = build_backbone(vgg, weights="none", image_size=32, with_top=True)
    whole.save_weights(tmp_path / "top.weights.h5")
    again = build_backbone(vgg, weights=str(tmp_path / "top.weights.h5"), image_size=32, with_top=True)
    np.testing.assert_allclose(again(IMAGES), whole(IMAGES), rtol=1e-5)
