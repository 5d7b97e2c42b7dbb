"""Cutting a backbone in two, and choosing what of it is trained: `head`, `last:N`, `from:LAYER` or `all`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

import keras

from tl_keras.errors import UserError

# Neither counts as a layer of the network: the one is the input's step, the other the pooling that we add.
NOT_COUNTED = ("preprocessing", "embedding_pool")
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class TrainablePart:
    """What of a backbone is trained.

    Attributes:
        cut: the trunk's last layer, for `cut(backbone, at=...)`; None where no trunk is left, and the whole network is
            trained.
        layers: the layers to train, shallow to deep, all after the cut; only layers that hold weights. The others
            after the cut stay frozen. Empty, with `head` alone: nothing of the backbone is trained.
    """

    cut: str | None
    layers: tuple[keras.layers.Layer, ...]


def list_cuts(backbone: keras.Model) -> list[str]:
    """Names all layers after which a backbone may be cut, shallow to deep.

    Args:
        backbone: a flat functional graph with one input, as `build_backbone` or `keras.saving.load_model` gives it.

    Returns:
        Layers whose output is one tensor that all later layers hang on; the last one is the backbone's own end. An
        addition written as `x + y` is no Keras layer, but has a name (`add_2`) and counts here.
    """
    return [backbone.operations[position].name for position in _find_cuts(backbone.operations)[1:]]


def list_from_values(backbone: keras.Model) -> list[str]:
    """Names all layers that `from:LAYER` takes: those which hang on nothing but one cut's tensor, shallow to deep."""
    operations = backbone.operations
    outputs = {id(operations[position].output) for position in _find_cuts(operations)}
    return [
        operation.name
        for operation in operations[1:]
        if {id(tensor) for tensor in keras.tree.flatten(operation.input)} <= outputs
    ]


def cut(backbone: keras.Model, *, at: str) -> tuple[keras.Model, keras.Model]:
    """Splits a backbone into trunk and tail at one layer's output.

    Args:
        backbone: images `(batch, height, width, 3)`, float32, RGB 0 to 255 → `(batch, dim)`, float32.
        at: the trunk's last layer.

    Returns:
        Trunk, images → `(batch, h, w, c)` or `(batch, dim)`, and tail; `tail(trunk(x))` is `backbone(x)`. Both share
        the backbone's layers: no weight is copied. At the backbone's last layer the tail gives back what it is given.

    Raises:
        UserError: no such layer, or a connection jumps over it.
    """
    operations = backbone.operations
    position = _find_position(backbone, at)
    if position not in _find_cuts(operations)[1:]:
        raise UserError(
            f"{backbone.name} cannot be cut after {at!r}: a connection jumps over it. "
            f"Nearest cuts: {_name_neighbours(backbone, list_cuts(backbone), position)}. Use one of them."
        )
    tensor = operations[position].output
    trunk = keras.Model(backbone.inputs[0], tensor, name=f"{backbone.name}_trunk")
    return trunk, _build_tail(backbone, tensor, name=at)


def read_layer(backbone: keras.Model, name: str, *, pooling: str) -> keras.Model:
    """A backbone as it is at one layer, for embeddings.

    Args:
        backbone: images `(batch, height, width, 3)`, float32, RGB 0 to 255 → anything.
        name: the layer; an addition written as `x + y` has a name too, see `list_cuts`.
        pooling: what makes a vector of a feature map: `avg` (mean over height and width), `max`, `flatten`.

    Returns:
        Images → `(batch, dim)`, float32. Its last layer is named after the layer, with `_avg`, `_max` or `_flatten`
        behind it where it is pooled. All layers are shared.

    Raises:
        UserError: no such layer, or one that gives no single map or vector; with the shapes of the nearest and of the
            cuts.
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
        f"Layers that all later ones hang on: {_describe(cuts, shapes)}."
    )


def _describe(names: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} ({'x'.join(map(str, shapes[name]))})" for name in names)


def choose_trainable(backbone: keras.Model, trainable: str, *, pretrained: bool) -> TrainablePart:
    """Reads `--trainable`: which layers are trained, and the deepest cut before the first of them.

    The cut is as deep as it may be, since what lies before it is computed only once. A trunk without weights (padding,
    preprocessing) would store larger arrays than the images and save nothing: the cut is None then, as with `all`.

    Args:
        backbone: a flat functional graph, as `build_backbone` gives it.
        trainable: `head` (nothing of the backbone), `last:N` (its last N layers, with weights or without, as in
            `backbone.layers[-N:]`, `embedding_pool` and `preprocessing` not counted), `from:LAYER` (LAYER and all that
            comes after the tensor it hangs on), `all`.
        pretrained: whether the backbone's weights were trained before. BatchNormalization layers are then left out:
            they stay frozen, and so in inference mode, since batches of a small new data set would spoil their
            statistics.

    Returns:
        The cut and the layers to train.

    Raises:
        UserError: text of another form, N of 0 or above the number of layers, no such layer, a layer inside a block,
            or nothing to train in what is named.
    """
    match = re.fullmatch(r"head|all|last:([1-9]\d*)|from:(.+)", trainable)
    if match is None:
        raise UserError(
            f"--trainable={trainable!r} is not understood. Allowed: head, last:N with N of 1 or more, from:LAYER, all. "
            "Correct it."
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
            f"--trainable={trainable} names only layers of {backbone.name} without weights that would be trained "
            "(activations, pooling, normalisation). Give an earlier layer, a larger N, or head."
        )
    return part


def _choose_last(backbone: keras.Model, count: int, pretrained: bool) -> TrainablePart:
    counted = [layer for layer in _network_layers(backbone) if layer.name not in NOT_COUNTED]
    if count > len(counted):
        raise UserError(
            f"--trainable=last:{count} asks for more layers than {backbone.name} has. Allowed: last:1 to "
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
            f"{_name_neighbours(backbone, from_values, position)}. Use from: with one of them."
        )
    after = max(cut for cut in _find_cuts(operations) if cut < position)
    layers = [operation for operation in operations[after + 1 :] if isinstance(operation, keras.layers.Layer)]
    return _choose_part(backbone, after=after, layers=layers, pretrained=pretrained)


def _choose_part(
    backbone: keras.Model, *, after: int, layers: Sequence[keras.layers.Layer], pretrained: bool
) -> TrainablePart:
    """Cuts after one position where the trunk is worth it, and leaves out what has no weights to train."""
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
    """Builds the graph after one tensor, its input named after the layer that made it."""
    tail_name = f"{backbone.name}_tail"
    if tensor is backbone.outputs[0]:
        embeddings = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)
        return keras.Model(embeddings, embeddings, name=tail_name)
    tail = keras.Model(tensor, backbone.outputs[0], name=tail_name)
    # Keras calls a graph's inner input `keras_tensor_41CLONE`: another number in every process, and saved with it.
    tail.layers[0].name = tail.inputs[0].name = name
    return tail


def _find_cuts(operations: Sequence[Any]) -> list[int]:
    """Finds the positions after which a graph may be cut, in linear time; the first is the input's, 0.

    Keras keeps operations in topological order. After position i a cut is valid where nothing made before i is used
    after i; `reach` is the furthest use of anything made so far.
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
    """The names that begin with an unknown one; where none does, those most like it."""
    begun = [known for known in names if known.startswith(name)][:_NAMED]
    return begun or difflib.get_close_matches(name, names, n=3, cutoff=0.0)


def _name_neighbours(backbone: keras.Model, names: Sequence[str], position: int) -> str:
    """Names the last of `names` before a position and the first after it, for an error message."""
    positions = {operation.name: i for i, operation in enumerate(backbone.operations)}
    before = [f"'{name}' before it" for name in names if positions[name] < position]
    after = [f"'{name}' after it" for name in names if positions[name] > position]
    return ", ".join(before[-1:] + after[:1])
