"""Cuts a backbone into trunk and tail, and selects the layers to train: `head`, `last:N`, `from:LAYER` or `all`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

import keras

from tl_keras.errors import UserError

# These do not count as layers of the network: tl_keras adds them for preprocessing and pooling.
NOT_COUNTED = ("preprocessing", "embedding_pool")
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class TrainablePart:
    """The part of a backbone that is trained.

    Attributes:
        cut: the last layer of the trunk, for `cut(backbone, at=...)`; None if there is no trunk.
        layers: the layers to train, shallow to deep; only layers with weights, all after the cut. Other layers after
            the cut stay frozen. Empty with `head`: no layer of the backbone is trained.
    """

    cut: str | None
    layers: tuple[keras.layers.Layer, ...]


def list_cuts(backbone: keras.Model) -> list[str]:
    """Lists all layers after which a backbone can be cut, shallow to deep.

    Args:
        backbone: a flat functional graph with one input, from `build_backbone` or `keras.saving.load_model`.

    Returns:
        Layers with a single output tensor on which all later layers depend; the last one is the end of the backbone.
        Additions written as `x + y` are not Keras layers, but have names (`add_2`) and are included.
    """
    return [backbone.operations[position].name for position in _find_cuts(backbone.operations)[1:]]


def list_from_values(backbone: keras.Model) -> list[str]:
    """Lists all layers allowed in `from:LAYER`, shallow to deep: layers whose only input is the tensor of a cut."""
    operations = backbone.operations
    outputs = {id(operations[position].output) for position in _find_cuts(operations)}
    return [
        operation.name
        for operation in operations[1:]
        if {id(tensor) for tensor in keras.tree.flatten(operation.input)} <= outputs
    ]


def cut(backbone: keras.Model, *, at: str) -> tuple[keras.Model, keras.Model]:
    """Splits a backbone into trunk and tail at the output of one layer.

    Args:
        backbone: images `(batch, height, width, 3)`, float32, RGB 0 to 255 → `(batch, dim)`, float32.
        at: name of the last layer of the trunk.

    Returns:
        The trunk, images → `(batch, h, w, c)` or `(batch, dim)`, and the tail; `tail(trunk(x))` equals `backbone(x)`.
        Both share the layers and weights of the backbone. At the last layer the tail is the identity.

    Raises:
        UserError: there is no such layer, or a connection bypasses it.
    """
    operations = backbone.operations
    position = _find_position(backbone, at)
    if position not in _find_cuts(operations)[1:]:
        raise UserError(
            f"{backbone.name} can't be cut after {at!r}: a connection bypasses it. "
            f"Nearest cuts: {_name_neighbors(backbone, list_cuts(backbone), position)}. Use one of them."
        )
    tensor = operations[position].output
    trunk = keras.Model(backbone.inputs[0], tensor, name=f"{backbone.name}_trunk")
    return trunk, _build_tail(backbone, tensor, name=at)


def read_layer(backbone: keras.Model, name: str, *, pooling: str) -> keras.Model:
    """Builds a network that outputs the embedding at one layer of a backbone.

    Args:
        backbone: images `(batch, height, width, 3)`, float32, RGB 0 to 255 → any output.
        name: name of the layer; additions written as `x + y` have names too, see `list_cuts`.
        pooling: pooling of a feature map: `avg`, `max` or `flatten`.

    Returns:
        Images → `(batch, dim)`, float32. If it is pooled, its last layer has the name of the layer with the suffix
        `_avg`, `_max` or `_flatten`. All layers are shared with the backbone.

    Raises:
        UserError: there is no such layer, or its output is not a single map or vector; the message has the shapes of
            the nearest layers and of the cuts.
    """
    operation = _find_candidate(backbone, name)
    tensor = operation.output
    if len(tensor.shape) == 4:
        build = {
            "avg": keras.layers.GlobalAveragePooling2D,
            "max": keras.layers.GlobalMaxPooling2D,
            "flatten": keras.layers.Flatten,
        }
        tensor = build[pooling](name=f"{name}_{pooling}")(tensor)
    return keras.Model(backbone.inputs[0], tensor, name=backbone.name)


def _find_candidate(backbone: keras.Model, name: str) -> Any:
    shapes = {
        operation.name: tuple(operation.output.shape[1:])
        for operation in backbone.operations[1:]
        if isinstance(operation.output, keras.KerasTensor) and len(operation.output.shape) in {2, 4}
    }
    if name in shapes:
        return backbone.operations[_find_position(backbone, name)]
    cuts = [known for known in list_cuts(backbone) if known in shapes and known not in NOT_COUNTED]
    close = _find_close(name, list(shapes))
    raise UserError(
        f"--feature_layer={name}: {backbone.name} has no such layer. Nearest: {_describe(close, shapes)}. "
        f"Ends of blocks: {_describe(cuts, shapes)}."
    )


def _describe(names: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} ({'x'.join(map(str, shapes[name]))})" for name in names)


def choose_trainable(backbone: keras.Model, trainable: str, *, pretrained: bool) -> TrainablePart:
    """Selects the layers of `--trainable`, and the deepest cut before the first of them.

    The cut is as deep as possible, because everything before it is computed only once. A trunk without weights
    (padding, preprocessing) would store arrays larger than the images and save nothing; then the cut is None, as with
    `all`.

    Args:
        backbone: a flat functional graph, from `build_backbone`.
        trainable: `head` (no layer of the backbone), `last:N` (its last N layers, with or without weights, like
            `backbone.layers[-N:]` without `embedding_pool` and `preprocessing`), `from:LAYER` (LAYER and everything
            after its input tensor), or `all`.
        pretrained: whether the weights of the backbone are pretrained. Then BatchNormalization layers stay frozen and
            in inference mode, because batches of a small new data set would spoil their statistics.

    Returns:
        The cut and the layers to train.

    Raises:
        UserError: the text has another form, N is 0 or larger than the number of layers, the layer does not exist or is
            inside a block, or the layers have no weights to train.
    """
    match = re.fullmatch(r"head|all|last:([1-9]\d*)|from:(.+)", trainable)
    if match is None:
        raise UserError(
            f"--trainable={trainable!r} is not understood. Allowed: head, last:N with N of 1 or more, from:LAYER, all."
        )
    if trainable == "head":
        return TrainablePart(cut=backbone.operations[-1].name, layers=())
    if trainable == "all":
        return _choose_part(backbone, after=0, layers=backbone.layers, pretrained=pretrained)
    if match[1]:
        part = _choose_last(backbone, int(match[1]), pretrained)
    else:
        part = _choose_from(backbone, match[2], pretrained)
    if not part.layers:
        raise UserError(
            f"--trainable={trainable} selects only layers of {backbone.name} without trainable weights (activations, "
            "pooling, normalization). Give an earlier layer, a larger N, or head."
        )
    return part


def _choose_last(backbone: keras.Model, count: int, pretrained: bool) -> TrainablePart:
    counted = [layer for layer in _network_layers(backbone) if layer.name not in NOT_COUNTED]
    if count > len(counted):
        raise UserError(
            f"--trainable=last:{count} selects more layers than {backbone.name} has. Allowed: last:1 to "
            f"last:{len(counted)}. Use a smaller N, or all."
        )
    layers = counted[-count:]
    first = _find_position(backbone, layers[0].name)
    after = max(position for position in _find_cuts(backbone.operations) if position < first)
    return _choose_part(backbone, after=after, layers=layers, pretrained=pretrained)


def _choose_from(backbone: keras.Model, name: str, pretrained: bool) -> TrainablePart:
    operations = backbone.operations
    position = _find_position(backbone, name)
    from_values = list_from_values(backbone)
    if name not in from_values:
        raise UserError(
            f"--trainable=from:{name} starts inside a block of {backbone.name}. Nearest layers that work: "
            f"{_name_neighbors(backbone, from_values, position)}. Use from: with one of them."
        )
    after = max(cut for cut in _find_cuts(operations) if cut < position)
    layers = [operation for operation in operations[after + 1 :] if isinstance(operation, keras.layers.Layer)]
    return _choose_part(backbone, after=after, layers=layers, pretrained=pretrained)


def _choose_part(
    backbone: keras.Model, *, after: int, layers: Sequence[keras.layers.Layer], pretrained: bool
) -> TrainablePart:
    """Cuts after one position if the trunk has weights, and keeps only layers with trainable weights."""
    frozen = (keras.layers.Normalization, keras.layers.BatchNormalization) if pretrained else keras.layers.Normalization
    trunk = backbone.operations[: after + 1]
    computes = any(
        isinstance(operation, keras.layers.Layer)
        and operation.weights
        and not isinstance(operation, keras.layers.Normalization)
        for operation in trunk
    )
    return TrainablePart(
        cut=trunk[-1].name if computes else None,
        layers=tuple(layer for layer in layers if layer.weights and not isinstance(layer, frozen)),
    )


def _network_layers(backbone: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in backbone.layers if not isinstance(layer, keras.layers.InputLayer)]


def _build_tail(backbone: keras.Model, tensor: keras.KerasTensor, *, name: str) -> keras.Model:
    """Builds the graph after one tensor; its input has the name of the layer that computes the tensor."""
    tail_name = f"{backbone.name}_tail"
    if tensor is backbone.outputs[0]:
        embeddings = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)
        return keras.Model(embeddings, embeddings, name=tail_name)
    tail = keras.Model(tensor, backbone.outputs[0], name=tail_name)
    # Keras names the inner input of a graph `keras_tensor_41CLONE`, with a number that differs between processes.
    tail.layers[0].name = tail.inputs[0].name = name
    return tail


def _find_cuts(operations: Sequence[Any]) -> list[int]:
    """Finds the positions after which a graph can be cut, in linear time; the first is that of the input, 0.

    Keras keeps operations in topological order. A cut after position i is valid if no tensor computed before i is used
    after i; `reach` is the furthest use of any tensor so far.
    """
    made_at = {
        id(tensor): i for i, operation in enumerate(operations) for tensor in keras.tree.flatten(operation.output)
    }
    last_use = list(range(len(operations)))
    for i, operation in enumerate(operations):
        for tensor in keras.tree.flatten(operation.input):
            last_use[made_at[id(tensor)]] = i
    cuts, reach = [], 0
    for i, operation in enumerate(operations):
        if reach <= i and len(keras.tree.flatten(operation.output)) == 1:
            cuts.append(i)
        reach = max(reach, last_use[i])
    return cuts


def _find_position(backbone: keras.Model, name: str) -> int:
    names = [operation.name for operation in backbone.operations]
    if name not in names:
        close = ", ".join(_find_close(name, names))
        raise UserError(f"{backbone.name} has no layer {name!r}. Nearest: {close}. Use one of its layers.")
    return names.index(name)


def _find_close(name: str, names: Sequence[str]) -> list[str]:
    """Finds names that start with an unknown name, or otherwise the most similar names."""
    begun = [known for known in names if known.startswith(name)][:_NAMED]
    return begun or difflib.get_close_matches(name, names, n=3, cutoff=0.0)


def _name_neighbors(backbone: keras.Model, names: Sequence[str], position: int) -> str:
    """Names the last of `names` before a position and the first after it, for an error message."""
    positions = {operation.name: i for i, operation in enumerate(backbone.operations)}
    before = [f"'{name}' before it" for name in names if positions[name] < position]
    after = [f"'{name}' after it" for name in names if positions[name] > position]
    return ", ".join(before[-1:] + after[:1])
