"""PyTorch baseline of benchmarks/extract.py, which runs it in a separate environment that has torch and torchvision.

python torch_peer.py embed NETWORK eager|compile FOLDER
    Measures images per second from files to embeddings, in bfloat16, channels last.

python torch_peer.py article FOLDER WEIGHTS.npz
    Runs the article's loop: VGG16's flattened last pooling layer over train, val and test, in batches of 32 in float32,
    then scikit-learn's LogisticRegression. Prints the predicted classes on val and test.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

NETWORKS = {
    "ResNet50": "resnet50",
    "VGG16": "vgg16",
    "MobileNetV2": "mobilenet_v2",
    "EfficientNetB0": "efficientnet_b0",
    "ConvNeXtTiny": "convnext_tiny",
}
CAFFE_MEANS = (103.939, 116.779, 123.68)  # BGR, 0 to 255, as in the training of the Keras weights
WORKERS = 2


class Photographs(Dataset):
    def __init__(self, paths: list[Path], prepare: object) -> None:
        self._paths, self._prepare = paths, prepare

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self._prepare(Image.open(self._paths[position]).convert("RGB"))


def embed(network: str, how: str, folder: str) -> None:
    model = getattr(torchvision.models, NETWORKS[network])(weights=None).eval().to(memory_format=torch.channels_last)
    for name in ("fc", "classifier"):
        if hasattr(model, name):
            setattr(model, name, torch.nn.Flatten())
    model = torch.compile(model) if how == "compile" else model
    shape = [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()]
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    paths = sorted(Path(folder).rglob("*.jpg"))
    loader = DataLoader(Photographs(paths, transforms.Compose([*shape, normalize])), 32, num_workers=WORKERS)
    first, done = 0.0, 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for images in loader:
            model(images.to(memory_format=torch.channels_last)).float().numpy()
            first, done = first or time.perf_counter(), done + len(images)
    print(json.dumps({"images a second": (done - 32) / (time.perf_counter() - first), "torch": torch.__version__}))


def article(folder: str, weights: str) -> None:
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    model = torchvision.models.vgg16(weights=None).eval()
    arrays = np.load(weights)
    convolutions = [layer for layer in model.features if isinstance(layer, torch.nn.Conv2d)]
    for number, layer in enumerate(convolutions):
        layer.weight.data = torch.from_numpy(arrays[f"kernel_{number}"].transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.from_numpy(arrays[f"bias_{number}"])
    shape = [transforms.Resize(224), transforms.CenterCrop(224), transforms.PILToTensor()]
    caffe = transforms.Lambda(lambda x: x.flip(0).float() - torch.tensor(CAFFE_MEANS)[:, None, None])
    found = {}
    for split in ("train", "val", "test"):
        paths = sorted((Path(folder) / split).glob("*/*.jpg"))
        loader = DataLoader(Photographs(paths, transforms.Compose([*shape, caffe])), 32, num_workers=WORKERS)
        with torch.no_grad():
            parts = [model.features(images).permute(0, 2, 3, 1).flatten(1).numpy() for images in loader]
        found[split] = np.concatenate(parts), np.array([path.parent.name for path in paths])
    probe = LogisticRegression(random_state=0, max_iter=1000).fit(*found["train"])
    decisions = {split: probe.predict(found[split][0]).tolist() for split in ("val", "test")}
    print(json.dumps({"seconds": time.perf_counter() - start, **decisions}))


if __name__ == "__main__":
    {"embed": embed, "article": article}[sys.argv[1]](*sys.argv[2:])
