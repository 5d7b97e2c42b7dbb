"""Plain Keras as a baseline: `fit` with a frozen base, as in Keras's guide (keras.io/guides/transfer_learning).

python -m benchmarks.plain_keras FOLDER BACKBONE WEIGHTS EPOCHS [TEST_FOLDER]
"""

from __future__ import annotations

import json
import sys
import time

import keras
import tensorflow as tf


def main(folder: str, backbone: str, weights: str, epochs: str, test_folder: str = "") -> None:
    size, constructor, preprocess, options = {
        "MobileNetV2": (224, keras.applications.MobileNetV2, keras.applications.mobilenet_v2, {"alpha": 0.35}),
        "ResNet50": (224, keras.applications.ResNet50, keras.applications.resnet50, {}),
    }[backbone]
    load = {"image_size": (size, size), "batch_size": 32, "seed": 0, "verbose": False}
    if test_folder:
        train = keras.utils.image_dataset_from_directory(folder, **load)
        val = keras.utils.image_dataset_from_directory(test_folder, **load)
    else:
        train, val = keras.utils.image_dataset_from_directory(folder, validation_split=0.25, subset="both", **load)
    classes = len(train.class_names)
    train, val = train.prefetch(tf.data.AUTOTUNE), val.prefetch(tf.data.AUTOTUNE)
    base = constructor(include_top=False, weights=None, input_shape=(size, size, 3), **options)
    if weights != "none":
        base.load_weights(weights)
    base.trainable = False
    inputs = keras.Input((size, size, 3))
    outputs = base(preprocess.preprocess_input(inputs), training=False)
    outputs = keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(outputs))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"], jit_compile=False)  # XLA is even slower
    ends = [time.perf_counter()]
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    history = model.fit(train, validation_data=val, epochs=int(epochs), verbose=0, callbacks=[clock])
    seconds = [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
    print(json.dumps({"epoch_seconds": seconds, "val_accuracy": history.history["val_accuracy"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
