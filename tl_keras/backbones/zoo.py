"""The zoo: one row for each backbone, and how a backbone is built from its row with the weights asked for.

Keras is imported when a backbone is built, not with this module: names and sizes are checked in milliseconds.
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

if TYPE_CHECKING:
    import h5py
    import keras

    Arrays = list[h5py.Dataset]


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of the zoo.

    Attributes:
        name: as in `keras.applications`.
        image_size: side of the square image, in pixels, that the ImageNet weights were made for.
        preprocessing: `caffe` (BGR minus ImageNet means), `tf` (-1 to 1), `torch` (mean and deviation), `inside` (the
            network does it itself).
        cuts: layers after which the backbone may be cut, shallow to deep: the ends of its last stages. Empty where the
            architecture admits none (each cell of a NASNet reads the two before it).
        licence: of the ImageNet weights (SPDX), as stated where Keras took them from.
        paper: authors, year, link.
        kwargs: arguments of the constructor that a user may set. Those that only change the top are left out.
        imagenet: whether Keras publishes ImageNet weights.
        imagenet_sizes: the image sizes there are ImageNet weights for, where each has its own; empty: one file for all.
        min_image_size: the smallest image the network takes.
        top: layers of the network's top that an embedding may be read at, shallow to deep; the last is extract's
            default.
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
    """The last blocks of the stages conv2 to conv5, from the number of blocks in each."""
    return tuple(f"conv{stage}_block{block}_out" for stage, block in enumerate(blocks, start=2))


def _efficientnet(*blocks: int) -> tuple[str, ...]:
    """The ends of stages 2, 3 and 5 (an eighth, a sixteenth of the image's side …), and the last map."""
    letters = [string.ascii_lowercase[block - 1] for block in blocks]
    return (*(f"block{stage}{letter}_add" for stage, letter in zip((2, 3, 5), letters, strict=True)), "top_activation")


def _convnext(size: str) -> tuple[str, ...]:
    """The stem and what halves each stage's map: stages end in additions, which Keras leaves without a name."""
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

# Licences: Keras's own documentation (docs/templates/applications.md up to Keras 2.3) for all that it names there; for
# EfficientNet (google/automl) and ConvNeXt (facebookresearch/ConvNeXt) the licence of the repository they came from.
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
    # Ours, for the quick start and for tests: seconds to train, nothing to download.
    Preset("SmallConvNet", 32, "tf", ("pool1", "pool2"), "none", "none", imagenet=False, min_image_size=4),
)

BACKBONES: dict[str, Preset] = {preset.name: preset for preset in _ROWS}

WEIGHTS_SUFFIXES = (".h5", ".hdf5", ".keras")

# What may be said of an argument, and how it is checked.
_KWARG_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alpha": ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < float("inf")),
    "depth_multiplier": ("a whole number of 1 or more", lambda value: type(value) is int and value >= 1),
    "minimalistic": ("True or False", lambda value: type(value) is bool),
}

# A connection that is dropped by a firewall would hang for minutes: Keras sets no limit of its own.
DOWNLOAD_STALL_SECONDS = 20.0
_SHAPES_SHOWN = 4


def find_preset(name: str) -> Preset:
    """Finds a row of the zoo by name, upper or lower case.

    Raises:
        UserError: no such backbone; the message names the nearest.
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

    The pooling is the last layer, but in ConvNeXt, which normalizes after it. Layers that Keras numbers are numbered
    anew from the start, so that a name means the same layer in every process.

    Args:
        preset: the row.
        weights: `imagenet` (downloaded once, kept by Keras), `none` (random, from Keras's global seed) or a file: the
            `.weights.h5` of Keras 3, the `.h5` of earlier ones (both with or without the network's top), or a whole
            `.keras` model, which is only read for its arrays, by the layers' names.
        image_size: side of the square images, in pixels.
        kwargs: arguments of the network's constructor, of those in `preset.kwargs`.
        with_top: the graph goes on to the last of `preset.top`, in place of the pooling.

    Returns:
        A model named as the preset: images `(batch, image_size, image_size, 3)`, float32, RGB 0 to 255 → embeddings
        `(batch, dim)`, float32.

    Raises:
        UserError: no such weights, a broken file or another network's; a download that failed; an image size or an
            argument that the network, or its ImageNet weights, do not admit.
    """
    kwargs = dict(kwargs or {})
    _check_kwargs(preset, kwargs)
    _check_image_size(preset, image_size, weights)
    if with_top and weights == "imagenet" and image_size != preset.image_size:
        raise UserError(
            f"the layers {', '.join(preset.top)} of {preset.name} have ImageNet weights for images of "
            f"{preset.image_size} pixels a side alone, not {image_size}. Leave out --image_size, or read another layer."
        )
    path = None if weights == "none" else _check_weights(preset, weights)
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
                f"{error} A file without the top will do for another layer: --feature_layer={preset.cuts[-1]}."
            ) from error
    return backbone


def _check_kwargs(preset: Preset, kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in preset.kwargs:
            allowed = f"Allowed: {', '.join(preset.kwargs)}" if preset.kwargs else "It takes none"
            raise UserError(f"{preset.name} takes no argument {name}={value!r}. {allowed}. Correct --backbone_kwargs.")
        rule, holds = _KWARG_RULES[name]
        if not holds(value):
            raise UserError(
                f"{preset.name} does not take {name}={value!r}. Allowed: {rule}. Correct --backbone_kwargs."
            )


def _check_image_size(preset: Preset, image_size: int, weights: str) -> None:
    if image_size < preset.min_image_size:
        raise UserError(
            f"{preset.name} does not take images of {image_size} pixels a side. Allowed: {preset.min_image_size} or "
            f"more. Set --image_size={preset.image_size}, its own."
        )
    if weights == "imagenet" and preset.imagenet_sizes and image_size not in preset.imagenet_sizes:
        raise UserError(
            f"{preset.name} has no ImageNet weights for images of {image_size} pixels a side. Allowed: "
            f"{', '.join(map(str, preset.imagenet_sizes))}. Use one of these, or --weights=FILE with another size's."
        )


def _check_weights(preset: Preset, weights: str) -> pathlib.Path | None:
    """Gives the path of a weights file that exists, None for `imagenet`."""
    if weights == "imagenet":
        if not preset.imagenet:
            raise UserError(
                f"{preset.name} has no ImageNet weights. Allowed: --weights=none, or a file. Use one of them."
            )
        return None
    path = pathlib.Path(weights)
    if path.suffix not in WEIGHTS_SUFFIXES or not os.path.isfile(path):
        raise UserError(
            f"--weights={weights!r} is no weights file. Allowed: imagenet, none, or an existing file that ends in "
            f"{', '.join(WEIGHTS_SUFFIXES)}. Correct it."
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
    """What builds the network of a row.

    Raises:
        UserError: the installed Keras does not have it.
    """
    import keras

    if not preset.imagenet:
        return _build_small_conv_net
    constructor = getattr(keras.applications, preset.name, None)  # the name is the table's, never the user's text
    if constructor is None:
        raise UserError(
            f"Keras {keras.__version__} has no network {preset.name}. Install another version of Keras, or choose "
            "another --backbone."
        )
    found: Callable[..., keras.Model] = constructor
    return found


def _build_small_conv_net(*, input_tensor: keras.KerasTensor, **_: Any) -> keras.Model:
    """Builds SmallConvNet, called as the constructors of keras.applications are."""
    import keras

    maps = input_tensor
    for i, filters in enumerate((32, 64, 128), start=1):
        maps = keras.layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"conv{i}")(maps)
        if i < 3:
            maps = keras.layers.MaxPooling2D(name=f"pool{i}")(maps)
    return keras.Model(keras.utils.get_source_inputs(input_tensor), keras.layers.GlobalAveragePooling2D()(maps))


@contextlib.contextmanager
def _explain_keras_errors(preset: Preset, image_size: int, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Says in one line what Keras raises where it has no such weights or cannot fetch them; lets no download hang."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_SECONDS)
    try:
        yield
    except Exception as error:  # keras.utils.get_file raises a bare Exception
        reason = " ".join(str(error).split()).rstrip(".")
        download = _find_download(error)
        if download is not None:
            url, path = download
            reason = reason.removeprefix(f"URL fetch failure on {url}: ").removeprefix("None -- ")
            raise UserError(
                f"Could not download the ImageNet weights of {preset.name} from {url} ({reason}). Download that file "
                f"on a machine with internet access and put it at {path}, or use --weights=none or a file."
            ) from error
        if isinstance(error, OSError):
            raise UserError(
                f"The ImageNet weights of {preset.name} that Keras keeps in ~/.keras/models (or $KERAS_HOME/models) "
                f"are broken ({reason}). Delete that file, so that it is downloaded again."
            ) from error
        if isinstance(error, ValueError):
            settings = ", ".join(f"{name}={value}" for name, value in {"image_size": image_size, **kwargs}.items())
            raise UserError(
                f"Keras does not build {preset.name} with {settings}: {reason}. Change --backbone_kwargs, or --weights."
            ) from error
        raise
    finally:
        socket.setdefaulttimeout(timeout)


def _find_download(error: BaseException) -> tuple[str, str] | None:
    """Finds URL and target of the download that failed. The message has no path, and NASNet's is not the URL's."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "get_file":
            return str(frame.f_locals["origin"]), str(frame.f_locals["download_target"])
    return None


def _name_layers(network: keras.Model) -> None:
    """Gives the pooling its fixed name, and the layers that Keras numbered over the whole process new numbers."""
    import keras

    poolings = [layer for layer in network.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D)]
    for pooling in poolings[-1:]:  # VGG with its top has none
        pooling.name = "embedding_pool"
    outline = [(type(operation).__name__, operation.name) for operation in network.operations]
    for operation, name in zip(network.operations, _number_anew(outline), strict=True):
        operation.name = name


def _number_anew(outline: Sequence[tuple[str, str]]) -> list[str]:
    """Numbers the names that Keras made (`conv2d_94` of a Conv2D) from the start; names that authors gave stay.

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
    """Conv2D → conv2d, BatchNormalization → batch_normalization: as Keras names layers, and their place in files."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", class_name)).lower()


def _load_weights_file(backbone: keras.Model, path: pathlib.Path) -> None:
    """Reads a weights file of any of Keras's three layouts; whatever more it holds, as a top, is left."""
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
            f"The weights file {path} cannot be read ({reason}). Allowed: whole .h5, .weights.h5 and .keras files "
            "written by Keras. Copy or download it again."
        ) from error
    _square_imagenet_variance(backbone)


@contextlib.contextmanager
def _open_weights(path: pathlib.Path) -> Iterator[tuple[h5py.File, dict[str, Any] | None]]:
    """Opens a weights file's arrays and, of a `.keras` model, its configuration: nothing in it is ever run."""
    import h5py

    with contextlib.ExitStack() as stack:
        if path.suffix != ".keras":
            yield stack.enter_context(h5py.File(path, "r")), None
            return
        archive = stack.enter_context(zipfile.ZipFile(path))
        config = json.loads(archive.read("config.json"))["config"]
        yield stack.enter_context(h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r")), config


# A layer's name, its variables, and the arrays that a file has for them.
_Slot = tuple[str, list[Any], "Arrays"]
# Class and name of a layer, and the layers inside it where it is a model.
_Outline = list[tuple[str, str, "list[Any] | None"]]


def _match_order(backbone: keras.Model, group: h5py.Group) -> list[_Slot]:
    """The layout up to Keras 2: layers in order, whatever their names; a top's come last.

    If the network lies inside another model, that model has all of its arrays as if it were one layer: those that were
    trainable come first.
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
    """Reads a list of names, which Keras splits into `name0`, `name1` … where it is above HDF5's 64 KiB."""
    parts = [name] if name in group.attrs else [key for key in group.attrs if re.fullmatch(rf"{name}\d+", key)]
    if not parts:
        raise KeyError(f"no attribute {name}")
    values = [value for part in sorted(parts, key=len) for value in group.attrs[part]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _match_places(backbone: keras.Model, file: h5py.File) -> list[_Slot]:
    """The layout of Keras 3: a layer's place is its class and how many of that class come before it."""
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
    """A `.keras` model, with whatever around or after the backbone, or the backbone inside it as a layer."""
    saved = list(_read_places(file, _outline_config(config)))
    names = _number_anew([(class_name, name) for class_name, name, _ in saved])
    arrays = dict(zip(names, (arrays for *_, arrays in saved), strict=True))
    return [(layer.name, layer.weights, arrays.get(layer.name, [])) for layer in _flatten(backbone)]


def _read_places(group: h5py.Group, outline: _Outline) -> Iterator[tuple[str, str, Arrays]]:
    """Reads class, name and arrays of each layer of an outline, those inside models among them."""
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
    """Gives the layers of a model, and those inside ConvNeXt's stem and downsampling blocks."""
    for layer in model.layers:
        yield from _flatten(layer) if hasattr(layer, "layers") else (layer,)


def _assign(backbone: keras.Model, slots: Sequence[_Slot], path: pathlib.Path) -> None:
    for name, variables, arrays in slots:
        needed, found = ([tuple(item.shape) for item in items] for items in (variables, arrays))
        if needed != found:
            raise UserError(
                f"The weights file {path} does not fit {backbone.name}: its layer '{name}' needs shapes "
                f"{_join(needed)}, the file has {_join(found)}. Use a file of this network, with the "
                "--backbone_kwargs it was made with."
            )
    for _, variables, arrays in slots:
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array[()])


def _join(shapes: Sequence[tuple[int, ...]]) -> str:
    more = f" and {len(shapes) - _SHAPES_SHOWN} more" if len(shapes) > _SHAPES_SHOWN else ""
    return (", ".join(map(str, shapes[:_SHAPES_SHOWN])) or "none") + more


def _square_imagenet_variance(backbone: keras.Model) -> None:
    """Makes up for the layer that EfficientNetB0 to B7 have only if Keras itself loads the ImageNet weights.

    Those files hold the deviations of ImageNet's channels where the Normalization layer takes variances, and Keras
    adds a Rescaling by one over their roots for `weights="imagenet"` alone
    (https://github.com/tensorflow/tensorflow/issues/49930). Squared, they give the same pixels without it.
    """
    import keras
    import numpy as np

    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            variance = np.asarray(layer.weights[1])
            if np.allclose(variance, (0.229, 0.224, 0.225), rtol=1e-3):
                layer.weights[1].assign(variance**2)
            layer.finalize_state()
