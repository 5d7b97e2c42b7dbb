"""The model zoo: one row for each backbone, and construction of backbones with pretrained weights.

Keras is imported only when a backbone is built, so that names and sizes can be checked in milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import pathlib
import re
import socket
import string
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tl_keras.errors import UserError
from tl_keras.run import Interrupts

if TYPE_CHECKING:
    import h5py
    import keras

    Arrays = list[h5py.Dataset]


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of the zoo.

    Attributes:
        name: name in `keras.applications`.
        image_size: image size of the ImageNet weights, in pixels.
        preprocessing: `caffe` (BGR minus ImageNet means), `tf` (-1 to 1), `torch` (mean and standard deviation), or
            `inside` (part of the network).
        cuts: layers after which the backbone can be cut, shallow to deep: the ends of its last stages. Empty if the
            architecture has none (each cell of a NASNet reads the two before it).
        licence: license of the ImageNet weights (SPDX), as stated by their source.
        paper: authors, year, link.
        kwargs: constructor arguments that a user may set, without those that only change the top.
        imagenet: whether Keras publishes ImageNet weights.
        imagenet_sizes: image sizes with ImageNet weights, if each size has its own file; empty if one file fits all.
        min_image_size: smallest image size of the network.
        top: layers of the network's top that can be used as embedding, shallow to deep; the last is the default of
            extract.
    """

    name: str
    image_size: int
    preprocessing: Literal["caffe", "tf", "torch", "inside"]
    cuts: tuple[str, ...]
    licence: str
    paper: str
    kwargs: tuple[str, ...] = ()
    imagenet: bool = True
    imagenet_sizes: tuple[int, ...] = ()
    min_image_size: int = 32
    top: tuple[str, ...] = ()


def _resnet(*blocks: int) -> tuple[str, ...]:
    """The last blocks of the stages conv2 to conv5, given the number of blocks in each."""
    return tuple(f"conv{stage}_block{block}_out" for stage, block in enumerate(blocks, start=2))


def _efficientnet(*blocks: int) -> tuple[str, ...]:
    """The ends of stages 2, 3 and 5 (1/8, 1/16, … of the image size), and the last feature map."""
    letters = [string.ascii_lowercase[block - 1] for block in blocks]
    return (*(f"block{stage}{letter}_add" for stage, letter in zip((2, 3, 5), letters, strict=True)), "top_activation")


def _convnext(size: str) -> tuple[str, ...]:
    """The stem and the downsampling blocks: stages end in additions, which have no stable names."""
    return (f"convnext_{size}_stem", *(f"convnext_{size}_downsampling_block_{stage}" for stage in range(3)))


_VGG = ("block2_pool", "block3_pool", "block4_pool", "block5_pool")
_VGG_TOP = ("flatten", "fc1", "fc2")
_XCEPTION = ("add_2", "add_10", "add_11", "block14_sepconv2_act")
_INCEPTION_RESNET = ("mixed_5b", "block35_10_ac", "block17_20_ac", "conv_7b_ac")
_MOBILENET = ("conv_pw_3_relu", "conv_pw_5_relu", "conv_pw_11_relu", "conv_pw_13_relu")
_MOBILENET_V2 = ("block_2_add", "block_5_add", "block_12_add", "out_relu")
_MOBILENET_V3_LARGE = ("expanded_conv_2_add", "expanded_conv_5_add", "expanded_conv_11_add", "expanded_conv_14_add")
_MOBILENET_V3_SMALL = ("expanded_conv_2_add", "expanded_conv_7_add", "expanded_conv_10_add")
_DENSENET = ("pool2_pool", "pool3_pool", "pool4_pool", "relu")

_SIMONYAN = "Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556"
_HE_2015 = "He et al. 2015, https://arxiv.org/abs/1512.03385"
_HE_2016 = "He et al. 2016, https://arxiv.org/abs/1603.05027"
_SZEGEDY_2015 = "Szegedy et al. 2015, https://arxiv.org/abs/1512.00567"
_SZEGEDY_2016 = "Szegedy et al. 2016, https://arxiv.org/abs/1602.07261"
_CHOLLET = "Chollet 2016, https://arxiv.org/abs/1610.02357"
_HUANG = "Huang et al. 2016, https://arxiv.org/abs/1608.06993"
_HOWARD_2017 = "Howard et al. 2017, https://arxiv.org/abs/1704.04861"
_SANDLER = "Sandler et al. 2018, https://arxiv.org/abs/1801.04381"
_HOWARD_2019 = "Howard et al. 2019, https://arxiv.org/abs/1905.02244"
_ZOPH = "Zoph et al. 2017, https://arxiv.org/abs/1707.07012"
_TAN_2019 = "Tan and Le 2019, https://arxiv.org/abs/1905.11946"
_TAN_2021 = "Tan and Le 2021, https://arxiv.org/abs/2104.00298"
_LIU = "Liu et al. 2022, https://arxiv.org/abs/2201.03545"

_V1 = ("alpha", "depth_multiplier")
_V3 = ("alpha", "minimalistic")
_V1_SIZES = (128, 160, 192, 224)

# Licenses: from the documentation of Keras (docs/templates/applications.md up to Keras 2.3); for EfficientNet
# (google/automl) and ConvNeXt (facebookresearch/ConvNeXt) from the repositories of their authors.
_ROWS = (
    Preset("VGG16", 224, "caffe", _VGG, "CC-BY-4.0", _SIMONYAN, top=_VGG_TOP),
    Preset("VGG19", 224, "caffe", _VGG, "CC-BY-4.0", _SIMONYAN, top=_VGG_TOP),
    Preset("ResNet50", 224, "caffe", _resnet(3, 4, 6, 3), "MIT", _HE_2015),
    Preset("ResNet101", 224, "caffe", _resnet(3, 4, 23, 3), "MIT", _HE_2015),
    Preset("ResNet152", 224, "caffe", _resnet(3, 8, 36, 3), "MIT", _HE_2015),
    Preset("ResNet50V2", 224, "tf", _resnet(3, 4, 6, 3), "BSD-3-Clause", _HE_2016),
    Preset("ResNet101V2", 224, "tf", _resnet(3, 4, 23, 3), "BSD-3-Clause", _HE_2016),
    Preset("ResNet152V2", 224, "tf", _resnet(3, 8, 36, 3), "BSD-3-Clause", _HE_2016),
    Preset("InceptionV3", 299, "tf", ("mixed2", "mixed7", "mixed10"), "Apache-2.0", _SZEGEDY_2015, min_image_size=75),
    Preset("InceptionResNetV2", 299, "tf", _INCEPTION_RESNET, "Apache-2.0", _SZEGEDY_2016, min_image_size=75),
    Preset("Xception", 299, "tf", _XCEPTION, "MIT", _CHOLLET, min_image_size=71),
    Preset("DenseNet121", 224, "torch", _DENSENET, "BSD-3-Clause", _HUANG),
    Preset("DenseNet169", 224, "torch", _DENSENET, "BSD-3-Clause", _HUANG),
    Preset("DenseNet201", 224, "torch", _DENSENET, "BSD-3-Clause", _HUANG),
    Preset("MobileNet", 224, "tf", _MOBILENET, "Apache-2.0", _HOWARD_2017, _V1, imagenet_sizes=_V1_SIZES),
    Preset(
        "MobileNetV2", 224, "tf", _MOBILENET_V2, "Apache-2.0", _SANDLER, ("alpha",), imagenet_sizes=(96, *_V1_SIZES)
    ),
    Preset("MobileNetV3Small", 224, "inside", _MOBILENET_V3_SMALL, "Apache-2.0", _HOWARD_2019, _V3),
    Preset("MobileNetV3Large", 224, "inside", _MOBILENET_V3_LARGE, "Apache-2.0", _HOWARD_2019, _V3),
    Preset("NASNetMobile", 224, "tf", (), "Apache-2.0", _ZOPH),
    Preset("NASNetLarge", 331, "tf", (), "Apache-2.0", _ZOPH),
    Preset("EfficientNetB0", 224, "inside", _efficientnet(2, 2, 3), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetB1", 240, "inside", _efficientnet(3, 3, 4), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetB2", 260, "inside", _efficientnet(3, 3, 4), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetB3", 300, "inside", _efficientnet(3, 3, 5), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetB4", 380, "inside", _efficientnet(4, 4, 6), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetB5", 456, "inside", _efficientnet(5, 5, 7), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetB6", 528, "inside", _efficientnet(6, 6, 8), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetB7", 600, "inside", _efficientnet(7, 7, 10), "Apache-2.0", _TAN_2019),
    Preset("EfficientNetV2B0", 224, "inside", _efficientnet(2, 2, 5), "Apache-2.0", _TAN_2021),
    Preset("EfficientNetV2B1", 240, "inside", _efficientnet(3, 3, 6), "Apache-2.0", _TAN_2021),
    Preset("EfficientNetV2B2", 260, "inside", _efficientnet(3, 3, 6), "Apache-2.0", _TAN_2021),
    Preset("EfficientNetV2B3", 300, "inside", _efficientnet(3, 3, 7), "Apache-2.0", _TAN_2021),
    Preset("EfficientNetV2S", 384, "inside", _efficientnet(4, 4, 9), "Apache-2.0", _TAN_2021),
    Preset("EfficientNetV2M", 480, "inside", _efficientnet(5, 5, 14), "Apache-2.0", _TAN_2021),
    Preset("EfficientNetV2L", 480, "inside", _efficientnet(7, 7, 19), "Apache-2.0", _TAN_2021),
    Preset("ConvNeXtTiny", 224, "inside", _convnext("tiny"), "MIT", _LIU),
    Preset("ConvNeXtSmall", 224, "inside", _convnext("small"), "MIT", _LIU),
    Preset("ConvNeXtBase", 224, "inside", _convnext("base"), "MIT", _LIU),
    Preset("ConvNeXtLarge", 224, "inside", _convnext("large"), "MIT", _LIU),
    Preset("ConvNeXtXLarge", 224, "inside", _convnext("xlarge"), "MIT", _LIU),
    # a network of tl_keras for the quick start and for tests: it trains in seconds and needs no download
    Preset("SmallConvNet", 32, "tf", ("pool1", "pool2"), "none", "none", imagenet=False, min_image_size=4),
)

BACKBONES: dict[str, Preset] = {preset.name: preset for preset in _ROWS}

WEIGHTS_SUFFIXES = (".h5", ".hdf5", ".keras")

# argument → description of the allowed values, and a check
_KWARG_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alpha": ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < float("inf")),
    "depth_multiplier": ("a whole number of 1 or more", lambda value: type(value) is int and value >= 1),
    "minimalistic": ("True or False", lambda value: type(value) is bool),
}

# Keras has no timeout: a connection that a firewall drops would hang for minutes.
DOWNLOAD_STALL_SECONDS = 20.0
_SHAPES_SHOWN = 4


def find_preset(name: str) -> Preset:
    """Finds a row of the zoo by name, ignoring case.

    Raises:
        UserError: there is no such backbone; the message has the nearest names.
    """
    by_lower = {preset.name.lower(): preset for preset in _ROWS}
    if name.lower() not in by_lower:
        nearest = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.0)
        raise UserError(
            f"Unknown backbone {name!r}. Nearest: {', '.join(by_lower[lower].name for lower in nearest)}. "
            "Use a network of keras.applications, or SmallConvNet."
        )
    return by_lower[name.lower()]


def build_backbone(
    preset: Preset,
    *,
    weights: str,
    image_size: int,
    kwargs: Mapping[str, float | int | bool] | None = None,
    with_top: bool = False,
) -> keras.Model:
    """Builds one flat graph from pixels to embeddings: `images`, `preprocessing`, the network, `embedding_pool`.

    The pooling is the last layer, except in ConvNeXt, which normalizes after it. Layers with names numbered by Keras
    are renumbered from the start, so that a name means the same layer in every process.

    Args:
        preset: row of the zoo.
        weights: `imagenet` (downloaded once, cached by Keras), `none` (random, from the global seed of Keras) or a
            file: a `.weights.h5` file of Keras 3, an `.h5` file of earlier versions (both with or without top), or a
            `.keras` model, from which only arrays are read, by layer name.
        image_size: height and width of the images, in pixels.
        kwargs: constructor arguments of the network, see `preset.kwargs`.
        with_top: whether the graph ends with the last layer of `preset.top` instead of the pooling.

    Returns:
        A model with the name of the preset: images `(batch, image_size, image_size, 3)`, float32, RGB 0 to 255 →
        embeddings `(batch, dim)`, float32.

    Raises:
        UserError: the weights do not exist, are damaged, belong to another network, or can't be downloaded; or the
            network or its ImageNet weights do not support the image size or an argument.
    """
    kwargs = dict(kwargs or {})
    path = check_backbone(preset, weights=weights, image_size=image_size, kwargs=kwargs)
    if with_top and weights == "imagenet" and image_size != preset.image_size:
        raise UserError(
            f"the layers {', '.join(preset.top)} of {preset.name} have ImageNet weights only for images of "
            f"{preset.image_size} x {preset.image_size} pixels, not {image_size}. Leave out --image_size, or use "
            "another layer."
        )
    from tl_keras.backbones.capacity import check_width

    check_width(preset.name, kwargs)
    published = None if path or weights == "none" else "imagenet"
    backbone = _build_network(preset, published, image_size, kwargs, with_top=with_top)
    if path:
        try:
            _load_weights_file(backbone, path)
        except UserError as error:
            if not with_top:
                raise
            raise UserError(
                f"{error} A file without the top works with another layer: --feature_layer={preset.cuts[-1]}."
            ) from error
    return backbone


def check_backbone(
    preset: Preset, *, weights: str, image_size: int, kwargs: Mapping[str, float | int | bool]
) -> pathlib.Path | None:
    """Checks the arguments of `build_backbone`, without loading Keras.

    Returns:
        The path of the weights file, if `weights` is one.

    Raises:
        UserError: see `build_backbone`.
    """
    _check_kwargs(preset, kwargs)
    _check_image_size(preset, image_size, weights)
    return None if weights == "none" else _check_weights(preset, weights)


def _check_kwargs(preset: Preset, kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in preset.kwargs:
            allowed = f"Allowed: {', '.join(preset.kwargs)}" if preset.kwargs else "It has no arguments"
            raise UserError(f"{preset.name} has no argument {name}={value!r}. {allowed}. Correct --backbone_kwargs.")
        rule, holds = _KWARG_RULES[name]
        if not holds(value):
            raise UserError(
                f"{preset.name} does not support {name}={value!r}. Allowed: {rule}. Correct --backbone_kwargs."
            )


def _check_image_size(preset: Preset, image_size: int, weights: str) -> None:
    if image_size < preset.min_image_size:
        raise UserError(
            f"{preset.name} does not support --image_size={image_size}. Allowed: {preset.min_image_size} or more. Its "
            f"default is {preset.image_size}."
        )
    if weights == "imagenet" and preset.imagenet_sizes and image_size not in preset.imagenet_sizes:
        raise UserError(
            f"{preset.name} has no ImageNet weights for --image_size={image_size}. Allowed: "
            f"{', '.join(map(str, preset.imagenet_sizes))}. Use one of these, or --weights=FILE with the weights of "
            "another size."
        )


def _check_weights(preset: Preset, weights: str) -> pathlib.Path | None:
    """Returns the path of an existing weights file, None for `imagenet`."""
    if weights == "imagenet":
        if not preset.imagenet:
            raise UserError(f"{preset.name} has no ImageNet weights. Allowed: --weights=none or --weights=FILE.")
        return None
    path = pathlib.Path(weights)
    if path.suffix not in WEIGHTS_SUFFIXES or not os.path.isfile(path):
        raise UserError(
            f"--weights={weights!r} is not a weights file. Allowed: imagenet, none, a run folder, or an existing file "
            f"with the suffix {', '.join(WEIGHTS_SUFFIXES)}. Check the path."
        )
    return path


def _build_network(
    preset: Preset, weights: str | None, image_size: int, kwargs: Mapping[str, Any], *, with_top: bool
) -> keras.Model:
    import keras

    from tl_keras.backbones.preprocessing import Preprocessing

    shape = (image_size, image_size, 3)
    images = keras.Input(shape, dtype="float32", name="images")
    pixels = images if preset.preprocessing == "inside" else Preprocessing(preset.preprocessing)(images)
    constructor = _find_constructor(preset)
    with _explain_keras_errors(preset, image_size, kwargs):
        network = constructor(
            include_top=with_top, weights=weights, input_tensor=pixels, input_shape=shape, pooling="avg", **kwargs
        )
    _name_layers(network)
    output = network.get_layer(preset.top[-1]).output if with_top else network.outputs[0]
    return keras.Model(images, output, name=preset.name)


def _find_constructor(preset: Preset) -> Callable[..., keras.Model]:
    """Finds the constructor of a network.

    Raises:
        UserError: the installed version of Keras does not have the network.
    """
    import keras

    if not preset.imagenet:
        return _build_small_conv_net
    constructor = getattr(keras.applications, preset.name, None)  # a name from the table, never text of the user
    if constructor is None:
        raise UserError(
            f"Keras {keras.__version__} has no network {preset.name}. Install another version of Keras, or choose "
            "another --backbone."
        )
    found: Callable[..., keras.Model] = constructor
    return found


def _build_small_conv_net(*, input_tensor: keras.KerasTensor, **_: Any) -> keras.Model:
    """Builds SmallConvNet, with the signature of the constructors of keras.applications."""
    import keras

    maps = input_tensor
    for i, filters in enumerate((32, 64, 128), start=1):
        maps = keras.layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"conv{i}")(maps)
        if i < 3:
            maps = keras.layers.MaxPooling2D(name=f"pool{i}")(maps)
    return keras.Model(keras.utils.get_source_inputs(input_tensor), keras.layers.GlobalAveragePooling2D()(maps))


@contextlib.contextmanager
def _explain_keras_errors(preset: Preset, image_size: int, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Turns exceptions of Keras about missing weights and failed downloads into one line; sets a download timeout."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_SECONDS)
    try:
        with Interrupts.restored():
            yield
    except Exception as error:  # keras.utils.get_file raises a bare Exception
        reason = " ".join(str(error).split()).rstrip(".")
        download = _find_download(error)
        if download is not None:
            url, path = download
            reason = reason.removeprefix(f"URL fetch failure on {url}: ").removeprefix("None -- ")
            raise UserError(
                f"Could not download the ImageNet weights of {preset.name} from {url} ({reason}). Download the file on "
                f"a machine with internet access and save it as {path}, or use --weights=none or --weights=FILE."
            ) from error
        if isinstance(error, OSError):
            raise UserError(
                f"The ImageNet weights of {preset.name} in the cache of Keras, ~/.keras/models (or $KERAS_HOME/models"
                f"), are damaged ({reason}). Delete the file; it will be downloaded again."
            ) from error
        if isinstance(error, ValueError):
            settings = ", ".join(f"{name}={value}" for name, value in {"image_size": image_size, **kwargs}.items())
            raise UserError(
                f"Keras can't build {preset.name} with {settings}: {reason}. Change --backbone_kwargs or --weights."
            ) from error
        raise
    finally:
        socket.setdefaulttimeout(timeout)


def _find_download(error: BaseException) -> tuple[str, str] | None:
    """Finds URL and target of a failed download; the error has no path, and its file name may differ from the URL."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "get_file":
            return str(frame.f_locals["origin"]), str(frame.f_locals["download_target"])
    return None


def _name_layers(network: keras.Model) -> None:
    """Names the pooling layer, and renumbers layers whose numbers depend on the process."""
    import keras

    poolings = [layer for layer in network.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D)]
    for pooling in poolings[-1:]:  # VGG with top has no pooling
        pooling.name = "embedding_pool"
    outline = [(type(operation).__name__, operation.name) for operation in network.operations]
    for operation, name in zip(network.operations, _number_anew(outline), strict=True):
        operation.name = name


def _number_anew(outline: Sequence[tuple[str, str]]) -> list[str]:
    """Renumbers the names generated by Keras (`conv2d_94` of a Conv2D) from the start; other names are kept.

    Args:
        outline: class and name of each layer.

    Returns:
        The new names, in the same order.
    """
    names = [name for _, name in outline]
    made: dict[str, list[tuple[int, int]]] = {}
    for position, (class_name, name) in enumerate(outline):
        match = re.fullmatch(rf"{_snake_case(class_name)}(?:_(\d+))?", name)
        if match:
            made.setdefault(_snake_case(class_name), []).append((int(match[1] or 0), position))
    for prefix, numbered in made.items():
        for number, (_, position) in enumerate(sorted(numbered)):
            names[position] = f"{prefix}_{number}" if number else prefix
    return names


def _snake_case(class_name: str) -> str:
    """Conv2D → conv2d, BatchNormalization → batch_normalization: the naming of layers in Keras and its files."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", class_name)).lower()


def _load_weights_file(backbone: keras.Model, path: pathlib.Path) -> None:
    """Loads a weights file in any of the three layouts of Keras; further layers in it, such as a top, are ignored."""
    try:
        with _open_weights(path) as (file, config):
            if config is not None:
                slots = _match_names(backbone, file, config)
            elif _find_models(file):
                found = [_match_places(backbone, group) for group in _find_models(file)]
                slots = next(filter(_fits, found), found[0])
            else:
                slots = _match_order(backbone, file.get("model_weights", file))
            _assign(backbone, slots, path)
    except (OSError, KeyError, json.JSONDecodeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The weights file {path} can't be read ({reason}). Allowed: complete .h5, .weights.h5 and .keras files "
            "written by Keras. Copy or download it again."
        ) from error
    _square_imagenet_variance(backbone)


@contextlib.contextmanager
def _open_weights(path: pathlib.Path) -> Iterator[tuple[h5py.File, dict[str, Any] | None]]:
    """Opens the arrays of a weights file, and the configuration of a `.keras` model; no code in it is executed."""
    import h5py

    with contextlib.ExitStack() as stack:
        if path.suffix != ".keras":
            yield stack.enter_context(h5py.File(path, "r")), None
            return
        archive = stack.enter_context(zipfile.ZipFile(path))
        config = json.loads(archive.read("config.json"))["config"]
        yield stack.enter_context(h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r")), config


# name of a layer, its variables, and their arrays in a file
_Slot = tuple[str, list[Any], "Arrays"]
# class and name of a layer, and its inner layers if it is a model
_Outline = list[tuple[str, str, "list[Any] | None"]]


def _match_order(backbone: keras.Model, group: h5py.Group) -> list[_Slot]:
    """The layout up to Keras 2: layers in order, regardless of their names; those of a top come last.

    If the network is nested in another model, the file has all of its arrays as one layer, trainable ones first.
    """
    saved: list[Arrays] = []
    for layer_name in _read_attribute(group, "layer_names"):
        arrays = [group[layer_name][name] for name in _read_attribute(group[layer_name], "weight_names")]
        saved += [arrays] if arrays else []
    layers = [layer for layer in backbone.layers if layer.weights]
    trained = [variable for layer in layers for variable in layer.trainable_weights]
    frozen = [variable for layer in layers for variable in layer.non_trainable_weights]
    for arrays in saved:
        for variables in (trained + frozen, [variable for layer in layers for variable in layer.weights]):
            slot = (backbone.name, variables, arrays)
            if len(layers) > 1 and _fits([slot]):
                return [slot]
    saved += [[]] * (len(layers) - len(saved))
    return [
        (layer.name, layer.trainable_weights + layer.non_trainable_weights, arrays)
        for layer, arrays in zip(layers, saved, strict=False)
    ]


def _read_attribute(group: h5py.Group, name: str) -> list[str]:
    """Reads a list of names, which Keras splits into `name0`, `name1`, … beyond the 64 KiB limit of HDF5."""
    parts = [name] if name in group.attrs else [key for key in group.attrs if re.fullmatch(rf"{name}\d+", key)]
    if not parts:
        raise KeyError(f"no attribute {name}")
    values = [value for part in sorted(parts, key=len) for value in group.attrs[part]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _match_places(backbone: keras.Model, file: h5py.File) -> list[_Slot]:
    """The layout of Keras 3: layers are stored by class, and numbered within their class."""
    saved = _read_places(file, _outline_model(backbone))
    return [(layer.name, layer.weights, arrays) for layer, (*_, arrays) in zip(_flatten(backbone), saved, strict=True)]


def _find_models(group: h5py.Group) -> list[h5py.Group]:
    """The file itself and the models inside it, outermost first, in the layout of Keras 3."""
    import h5py

    found = [group] if "layers" in group else []
    for place in (group, group.get("layers", {})):
        for inner in place.values():
            if isinstance(inner, h5py.Group) and inner is not group and inner.name.rpartition("/")[2] != "layers":
                found += _find_models(inner)
    return found


def _fits(slots: Sequence[_Slot]) -> bool:
    """Whether all arrays have the shapes of their variables."""
    return all(
        [tuple(one.shape) for one in variables] == [tuple(one.shape) for one in arrays]
        for _, variables, arrays in slots
    )


def _match_names(backbone: keras.Model, file: h5py.File, config: dict[str, Any]) -> list[_Slot]:
    """A `.keras` model: the backbone, possibly with further layers, or nested as a layer."""
    saved = list(_read_places(file, _outline_config(config)))
    names = _number_anew([(class_name, name) for class_name, name, _ in saved])
    arrays = dict(zip(names, (arrays for *_, arrays in saved), strict=True))
    return [(layer.name, layer.weights, arrays.get(layer.name, [])) for layer in _flatten(backbone)]


def _read_places(group: h5py.Group, outline: _Outline) -> Iterator[tuple[str, str, Arrays]]:
    """Reads class, name and arrays of each layer of an outline, including layers of nested models."""
    seen: Counter[str] = Counter()
    for class_name, name, inner in outline:
        key = _snake_case(class_name)
        place = f"layers/{key}_{seen[key]}" if seen[key] else f"layers/{key}"
        seen[key] += 1
        if inner is not None:
            yield from _read_places(group.get(place, {}), inner)
        else:
            arrays = group.get(f"{place}/vars", {})
            yield class_name, name, [arrays[str(i)] for i in range(len(arrays))]


def _outline_model(model: keras.Model) -> _Outline:
    return [
        (type(layer).__name__, layer.name, _outline_model(layer) if hasattr(layer, "layers") else None)
        for layer in model.layers
    ]


def _outline_config(config: dict[str, Any]) -> _Outline:
    return [
        (
            layer["class_name"],
            layer["config"]["name"],
            _outline_config(layer["config"]) if "layers" in layer["config"] else None,
        )
        for layer in config.get("layers", [])
    ]


def _flatten(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields the layers of a model, including those inside the stem and downsampling blocks of ConvNeXt."""
    for layer in model.layers:
        yield from _flatten(layer) if hasattr(layer, "layers") else (layer,)


def _assign(backbone: keras.Model, slots: Sequence[_Slot], path: pathlib.Path) -> None:
    for name, variables, arrays in slots:
        needed, found = ([tuple(item.shape) for item in items] for items in (variables, arrays))
        if needed != found:
            raise UserError(
                f"The weights file {path} does not fit {backbone.name}: its layer '{name}' needs shapes "
                f"{_join(needed)}, but the file has {_join(found)}. Use weights of this network, with the same "
                "--backbone_kwargs."
            )
    for _, variables, arrays in slots:
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array[()])


def _join(shapes: Sequence[tuple[int, ...]]) -> str:
    more = f" and {len(shapes) - _SHAPES_SHOWN} more" if len(shapes) > _SHAPES_SHOWN else ""
    return (", ".join(map(str, shapes[:_SHAPES_SHOWN])) or "none") + more


def _square_imagenet_variance(backbone: keras.Model) -> None:
    """Corrects the normalization of EfficientNetB0 to B7 for ImageNet weights that are loaded from a file.

    These files contain standard deviations of ImageNet's channels where the Normalization layer expects variances. With
    `weights="imagenet"` Keras adds a Rescaling layer that compensates for this
    (https://github.com/tensorflow/tensorflow/issues/49930). Squaring the values has the same effect without that layer.
    """
    import keras
    import numpy as np

    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            variance = np.asarray(layer.weights[1])
            if np.allclose(variance, (0.229, 0.224, 0.225), rtol=1e-3):
                layer.weights[1].assign(variance**2)
            layer.finalize_state()
