"""Cuts of a small residual network whose answers can be read off its few lines, and `--trainable` on it."""

import keras
import numpy as np
import pytest

from tl_keras.backbones.cut import choose_trainable, cut, list_cuts, list_from_values, read_layer
from tl_keras.errors import UserError

IMAGES = np.random.default_rng(0).uniform(0, 255, (3, 8, 8, 3)).astype("float32")


@pytest.fixture
def backbone():
    """Stem, a block with a shortcut, a block that ends in a nameless addition, a last convolution, the pooling."""
    layers = keras.layers
    images = keras.Input((8, 8, 3), name="images")
    x = layers.Rescaling(1 / 255, name="preprocessing")(images)
    x = stem = layers.Conv2D(4, 3, padding="same", name="stem")(x)
    x = layers.Conv2D(4, 3, padding="same", name="a_conv")(x)
    x = layers.BatchNormalization(name="a_bn")(x)
    shortcut = layers.Conv2D(4, 1, name="a_shortcut")(stem)
    x = a_out = layers.Add(name="a_out")([shortcut, x])
    x = layers.Conv2D(4, 3, padding="same", name="b_conv_1")(x)
    x = layers.Conv2D(4, 3, padding="same", name="b_conv_2")(x)
    x = layers.Conv2D(5, 1, name="top")(a_out + x)
    x = layers.BatchNormalization(name="top_bn")(x)
    x = layers.ReLU(name="top_relu")(x)
    model = keras.Model(images, layers.GlobalAveragePooling2D(name="embedding_pool")(x), name="Toy")
    next(operation for operation in model.operations if not isinstance(operation, layers.Layer)).name = "b_out"
    return model


CUTS = ["preprocessing", "stem", "a_out", "b_out", "top", "top_bn", "top_relu", "embedding_pool"]


def user_error(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_cuts_are_the_tensors_that_all_later_layers_hang_on(backbone):
    assert list_cuts(backbone) == CUTS


def test_from_values_hang_on_one_cut(backbone):
    expected = [
        "preprocessing",
        "stem",
        "a_conv",
        "a_shortcut",
        "b_conv_1",
        "top",
        "top_bn",
        "top_relu",
        "embedding_pool",
    ]
    assert sorted(list_from_values(backbone)) == sorted(expected)


@pytest.mark.parametrize("at", CUTS)
def test_tail_of_trunk_is_the_backbone(backbone, at):
    trunk, tail = cut(backbone, at=at)
    assert (trunk.name, tail.name) == ("Toy_trunk", "Toy_tail")
    assert tail.layers[0].name == tail.inputs[0].name == at
    np.testing.assert_array_equal(tail(trunk(IMAGES)), backbone(IMAGES))


def test_tail_shares_its_weights_with_the_backbone(backbone):
    _, tail = cut(backbone, at="a_out")
    assert {id(weight) for weight in tail.weights} < {id(weight) for weight in backbone.weights}
    before = backbone(IMAGES).numpy()
    tail.get_layer("top").bias.assign_add(np.ones(5))
    assert np.abs(backbone(IMAGES) - before).max() > 0.1


def test_trunk_tail_and_backbone_save_after_several_cuts(backbone, tmp_path):
    parts = [backbone, *cut(backbone, at="stem"), *cut(backbone, at="b_out"), *cut(backbone, at="embedding_pool")]
    for part in parts:
        part.save(tmp_path / "part.keras")
        loaded = keras.saving.load_model(tmp_path / "part.keras")
        inputs = np.ones((2, *part.input_shape[1:]), "float32")
        np.testing.assert_array_equal(loaded(inputs), part(inputs))
    assert list_cuts(backbone) == CUTS


def test_loaded_backbone_is_cut_like_the_one_saved(backbone, tmp_path):
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.saving.load_model(tmp_path / "backbone.keras")
    assert list_cuts(loaded) == CUTS
    trunk, tail = cut(loaded, at="b_out")
    np.testing.assert_array_equal(tail(trunk(IMAGES)), backbone(IMAGES))


def test_two_tensors_at_once_are_no_cut():
    images = keras.Input((4, 4, 3), name="images")
    one, two = keras.ops.split(images, [1], axis=-1)
    model = keras.Model(images, keras.layers.Concatenate(name="end")([one, two]), name="Split")
    assert list_cuts(model) == ["end"]


def test_cut_inside_a_block_names_the_nearest_cuts(backbone):
    assert user_error(cut, backbone, at="a_bn") == (
        "Toy can't be cut after 'a_bn': a connection bypasses it. "
        "Nearest cuts: 'stem' before it, 'a_out' after it. Use one of them."
    )


def test_cut_at_the_input_names_the_first_cut(backbone):
    assert "Nearest cuts: 'preprocessing' after it." in user_error(cut, backbone, at="images")


def test_an_unknown_layer_that_begins_others_names_them(backbone):
    message = user_error(choose_trainable, backbone, "from:top_", pretrained=True)
    assert "Nearest: top_bn, top_relu. Use one" in message


def test_cut_at_an_unknown_layer_names_the_nearest_names(backbone):
    message = user_error(cut, backbone, at="topbn")
    assert message.startswith("Toy has no layer 'topbn'. Nearest: top_bn, top, ")
    assert message.endswith("Use one of its layers.")


def choose(backbone, trainable, *, pretrained=True):
    part = choose_trainable(backbone, trainable, pretrained=pretrained)
    return part.cut, [layer.name for layer in part.layers]


@pytest.mark.parametrize(
    ("trainable", "expected_cut", "expected_layers"),
    [
        ("head", "embedding_pool", []),
        ("last:3", "b_out", ["top"]),
        ("last:4", "a_out", ["b_conv_2", "top"]),
        ("last:5", "a_out", ["b_conv_1", "b_conv_2", "top"]),
        ("last:10", None, ["stem", "a_conv", "a_shortcut", "b_conv_1", "b_conv_2", "top"]),
        ("from:top", "b_out", ["top"]),
        ("from:b_conv_1", "a_out", ["b_conv_1", "b_conv_2", "top"]),
        ("from:a_shortcut", "stem", ["a_conv", "a_shortcut", "b_conv_1", "b_conv_2", "top"]),
        ("from:stem", None, ["stem", "a_conv", "a_shortcut", "b_conv_1", "b_conv_2", "top"]),
        ("all", None, ["stem", "a_conv", "a_shortcut", "b_conv_1", "b_conv_2", "top"]),
    ],
)
def test_trainable_gives_the_deepest_cut_and_what_is_trained(backbone, trainable, expected_cut, expected_layers):
    assert choose(backbone, trainable) == (expected_cut, expected_layers)


def test_batch_normalization_is_trained_only_where_nothing_was_before(backbone):
    assert choose(backbone, "last:3", pretrained=False) == ("b_out", ["top", "top_bn"])
    assert "a_bn" in choose(backbone, "all", pretrained=False)[1]


@pytest.mark.parametrize("trainable", ["last:0", "last:x", "last:-1", "last:", "lats:3", "from:", "Head", "", "head\n"])
def test_malformed_trainable_is_told_what_is_allowed(backbone, trainable):
    assert user_error(choose, backbone, trainable) == (
        f"--trainable={trainable!r} is not understood. Allowed: head, last:N with N of 1 or more, from:LAYER, all."
    )


def test_more_layers_than_there_are_is_told_how_many(backbone):
    assert user_error(choose, backbone, "last:11") == (
        "--trainable=last:11 selects more layers than Toy has. Allowed: last:1 to last:10. Use a smaller N, or all."
    )


def test_from_inside_a_block_names_the_nearest_that_work(backbone):
    assert user_error(choose, backbone, "from:b_conv_2") == (
        "--trainable=from:b_conv_2 starts inside a block of Toy. "
        "Nearest layers that work: 'b_conv_1' before it, 'top' after it. Use from: with one of them."
    )


def test_from_an_unknown_layer_names_the_nearest(backbone):
    assert user_error(choose, backbone, "from:b_conv1").startswith("Toy has no layer 'b_conv1'. Nearest: b_conv_1, ")


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("avg", lambda maps: maps.mean((1, 2))),
        ("max", lambda maps: maps.max((1, 2))),
        ("flatten", lambda maps: maps.reshape(len(maps), -1)),
    ],
)
@pytest.mark.parametrize("layer", ["stem", "a_out", "top"])
def test_a_layer_is_read_as_it_is_and_pooled(backbone, layer, pooling, pool):
    reader = read_layer(backbone, layer, pooling=pooling)
    maps = keras.Model(backbone.input, backbone.get_layer(layer).output)(IMAGES).numpy()
    np.testing.assert_allclose(reader(IMAGES), pool(maps), rtol=1e-5, atol=1e-6)
    assert reader.layers[-1].name == reader.operations[-1].name == f"{layer}_{pooling}"


def test_a_layer_that_gives_a_vector_is_not_pooled(backbone):
    reader = read_layer(backbone, "embedding_pool", pooling="max")
    np.testing.assert_allclose(reader(IMAGES), backbone(IMAGES), rtol=1e-6)
    assert reader.operations[-1].name == "embedding_pool"


def test_layers_are_read_beside_each_other_with_the_backbones_own_weights(backbone):
    first, second = (read_layer(backbone, layer, pooling="avg") for layer in ("stem", "a_out"))
    before = second(IMAGES).numpy()
    joined = keras.Model(backbone.input, [first.output, second.output])(IMAGES)
    np.testing.assert_allclose(joined[1], before, rtol=1e-6)
    backbone.get_layer("stem").bias.assign_add(np.ones(4))
    assert np.abs(second(IMAGES) - before).max() > 0.1


def test_a_layer_that_gives_no_map_and_no_vector_can_not_be_read(backbone):
    pixels = keras.layers.Reshape((64, 3), name="pixels")(backbone.input)
    rows = keras.Model(backbone.input, keras.layers.GlobalAveragePooling1D(name="mean")(pixels), name="Rows")
    message = user_error(read_layer, rows, "pixels", pooling="avg")
    assert message.startswith("--feature_layer=pixels: Rows has no such layer. Nearest: mean (3).")


def test_an_addition_without_a_layer_can_be_read(backbone):
    additions = [one.name for one in backbone.operations if not isinstance(one, keras.layers.Layer)]
    assert additions
    for name in additions:
        reader = read_layer(backbone, name, pooling="avg")
        maps = keras.Model(backbone.input, next(one.output for one in backbone.operations if one.name == name))(IMAGES)
        np.testing.assert_allclose(reader(IMAGES), maps.numpy().mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_an_unknown_layer_to_read_is_answered_with_shapes(backbone):
    message = user_error(read_layer, backbone, "topbn", pooling="avg")
    assert message.startswith("--feature_layer=topbn: Toy has no such layer. Nearest: top_bn (")
    assert "x5), " in message
    assert "Ends of blocks: stem (" in message
    assert "preprocessing" not in message.partition("hang on")[2]
