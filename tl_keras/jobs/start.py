"""The start of a job: network, examples, run folder, and the state shared by later steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import keras
import numpy as np

from tl_keras.audit.examine import describe_origin
from tl_keras.audit.files import inspect_file
from tl_keras.audit.findings import Finding
from tl_keras.backbones.embed import Embedded, embed
from tl_keras.backbones.engines import BATCH_SIZE
from tl_keras.backbones.zoo import Preset, build_backbone, find_preset
from tl_keras.classifier import Classifier, load_trained
from tl_keras.config import BackboneConfig, Config, default_store_dir, is_run, parse_kwargs
from tl_keras.data.depth import DepthCheck
from tl_keras.data.examples import Examples, draw_shots, scan, split_source
from tl_keras.data.images import DECODER_VERSION, explain_broken, make_images
from tl_keras.data.sources import Source, load_source
from tl_keras.data.splits import SPLITS, carve, check_classes
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import TrainedOn, write_earlier_images
from tl_keras.evaluation.slices import Attributes, read_attributes
from tl_keras.evaluation.tables import describe_device
from tl_keras.jobs.lineage import read_lineage, trace_weights
from tl_keras.report.card import Card, load_card
from tl_keras.run import RunFolder, Screen, Stopwatch, name_run


@dataclasses.dataclass(frozen=True)
class Network:
    """The backbone of a job, before its data is known.

    Attributes:
        config: all settings.
        screen: what the user sees.
        preset: entry of the model zoo.
        backbone: images `(b, h, w, 3)` → embeddings `(b, dim)`, one flat graph.
    """

    config: Config
    screen: Screen
    preset: Preset
    backbone: keras.Model

    @property
    def image_size(self) -> int:
        """Height and width of the network's input, in pixels."""
        return int(self.backbone.input_shape[1])


@dataclasses.dataclass
class Job:
    """One run: its network, its examples, its folder.

    Attributes:
        network: the backbone.
        folder: the run folder.
        examples: labeled images; those that can't be decoded are removed when they are found.
        warnings: the warnings that were shown.
        oddities: findings about how files are stored, if a report or an audit shows them.
        attributes: attributes of the examples (--slices).
        embeddings_only: whether labels are not used.
        seen: images that this run, or an earlier one of its network, is trained on.
        card: the user's entries for the model card.
    """

    network: Network
    folder: RunFolder
    examples: Examples
    warnings: list[str]
    oddities: list[Finding]
    attributes: Attributes | None = None
    embeddings_only: bool = False
    seen: TrainedOn | None = None
    card: Card = dataclasses.field(default_factory=lambda: Card({}))

    @property
    def config(self) -> Config:
        """All settings."""
        return self.network.config

    @property
    def screen(self) -> Screen:
        """What the user sees."""
        return self.network.screen

    @property
    def watch(self) -> Stopwatch:
        """Seconds by stage."""
        return self.network.screen.watch

    @property
    def store_dir(self) -> str:
        """Folder of the embedding stores."""
        return self.config.engine.store_dir or default_store_dir()

    def embed(self, trunks: Sequence[keras.Model], *, mirrored: bool = False) -> list[Embedded]:
        """Computes the embeddings that the store lacks; removes the images that can't be decoded.

        Args:
            trunks: see `embed.embed`.
            mirrored: whether training images are embedded mirrored as well.

        Returns:
            The embeddings of each trunk.
        """
        image_size, resize, engine = self.network.image_size, self.config.backbone.resize, self.config.engine
        read = self.examples.source.read
        found = embed(
            trunks,
            wanted=wanted_views(self.examples, mirrored=mirrored),
            digests=self.examples.digests,
            images=functools.partial(
                make_images,
                read,
                image_size=image_size,
                resize=resize,
                batch_size=BATCH_SIZE,
                digests=self.examples.digests,
            ),
            address={
                "backbone": self.network.preset.name,
                "image_shape": [image_size, image_size, 3],
                "resize": resize,
                "decoder": DECODER_VERSION,
            },
            engine=engine.engine,
            precision=engine.precision,
            store_dir=self.store_dir,
            show=self.screen.line,
            show_progress=self.screen.progress,
            exact=None if self.embeddings_only else np.flatnonzero(self.examples.splits > 0),
        )
        self._remove_broken(found[0].broken)
        return found

    def warn(self, text: str) -> None:
        """Shows a warning that the report repeats."""
        self.screen.warning(text)
        self.warnings.append(text)

    def draw(self, seed: int) -> Job:
        """The job with one random draw of `--shots`; a single draw is part of its splits already."""
        shots = self.config.data.shots
        if shots is None or count_draws(self.config) == 1:
            return self
        return dataclasses.replace(self, examples=draw_shots(self.examples, shots=shots, seed=seed))

    def name_classifier(self, network: keras.Model, embedding_layer: str) -> Classifier:
        """The classifier of a trained network, images → logits `(b, classes)`."""
        return Classifier(
            network,
            name=f"{self.examples.source.name}-{self.network.preset.name}",
            labels=self.examples.class_names,
            backbone=self.network.preset.name,
            embedding_layer=embedding_layer,
            resize=self.config.backbone.resize,
        )

    def _remove_broken(self, broken: Sequence[int]) -> None:
        if broken:
            size, resize = self.network.image_size, self.config.backbone.resize
            reasons = {
                position: explain_broken(content, image_size=size, resize=resize) or "changed while it was read"
                for position, content in self.examples.source.read(broken)
            }
            limit = self.config.data.max_broken_fraction
            self.examples = self.examples.without(reasons, max_broken_fraction=limit, report=self.folder.write_broken)
        if self.examples.broken:
            self.warn(self.folder.describe_broken(len(self.examples.broken)))
        for warning in [] if self.embeddings_only else _check_classes(self.examples):
            if warning not in self.warnings:
                self.warn(warning)


def load_network(config: Config, screen: Screen, *, with_top: bool = False) -> Network:
    """Loads the backbone of a job, after setting the random seed.

    Args:
        config: all settings.
        screen: what the user sees.
        with_top: see `load_backbone`.

    Raises:
        UserError: there is no such backbone, or no such weights.
    """
    keras.utils.set_random_seed(config.run.seed)
    with screen.watch.stage("backbone"):
        preset, backbone = load_backbone(config.backbone, with_top=with_top)
    return Network(config, screen, preset, backbone)


def load_backbone(config: BackboneConfig, *, with_top: bool = False) -> tuple[Preset, keras.Model]:
    """Loads a backbone with its weights, as one flat graph.

    Args:
        config: which, with which weights.
        with_top: see `build_backbone`.

    Raises:
        UserError: there is no such backbone, or no such weights.
    """
    if not is_run(config.weights):
        preset = find_preset(config.backbone or "")
        size = config.image_size or preset.image_size
        kwargs = parse_kwargs(config.backbone_kwargs)
        backbone = build_backbone(
            preset, weights=config.weights, image_size=size, kwargs=kwargs, with_top=with_top and bool(preset.top)
        )
        return preset, backbone
    earlier = load_trained(config.weights)
    preset = find_preset(config.backbone or earlier.backbone)
    size = config.image_size or earlier.image_size
    if (preset.name, size) != (earlier.backbone, earlier.image_size) or config.backbone_kwargs:
        raise UserError(
            f"--weights={config.weights} is a {earlier.backbone} of {earlier.image_size} pixels; it can't become "
            f"{preset.name} of {size}. Leave out --backbone, --backbone_kwargs and --image_size."
        )
    return preset, earlier.embedder


def start(network: Network, *, asked: Config | None = None) -> Job:
    """Finds and splits the labeled images, creates the run folder, and reads the bytes of every image once.

    Args:
        network: the backbone, and the settings.
        asked: the settings that are kept in the run folder, if they differ.

    Raises:
        UserError: the data can't be found or used, or the run folder can't be created.
    """
    config, screen, data = network.config, network.screen, network.config.data
    card = load_card(config.evaluation.card)
    with network.screen.watch.stage("data"):
        is_audit = config.mode == "audit"
        source = load_source(
            data.dataset or "",
            data_dir=data.data_dir,
            classes=data.classes,
            allow_unlabeled=config.probe.embeddings_output is not None or is_audit,
        )
        embeddings_only = not source.class_names or "none" in config.probe.probe or is_audit
        splits, split_warnings = _split(source, config, embeddings_only=embeddings_only)
        attributes = read_attributes(config.evaluation.slices, source.ids)
        run_dir = config.run.run_dir or name_run(config.mode, source.name, network.preset.name)
        folder = create_folder(run_dir, asked or config, screen)
        inspector = _Inspector(image_size=network.image_size, lists_oddities=is_audit or config.evaluation.report)
        examples = scan(
            source,
            splits,
            max_broken_fraction=data.max_broken_fraction,
            show_progress=screen.progress,
            report=folder.write_broken,
            look=inspector.inspect,
        )
    missing = [] if embeddings_only else _check_classes(examples)
    ancestry = trace_weights(config.backbone.weights)
    lineage = None if embeddings_only else read_lineage(ancestry, examples, fitted=set(config.probe.refit.split("+")))
    if lineage and ancestry.runs:
        write_earlier_images(folder.path, lineage.earlier)
    origin = describe_origin(data.dataset or "", ancestry.initial, examples.class_names)
    warnings = list(dict.fromkeys([*source.notes, *split_warnings, *missing, *([origin] if origin else [])]))
    warnings += [*inspector.depth.notes(), *(lineage.notes if lineage else ())]
    _introduce(screen, source, examples, warnings)
    seen = lineage.seen if lineage else None
    return Job(network, folder, examples, warnings, inspector.oddities, attributes, embeddings_only, seen, card)


def create_folder(run_dir: str, config: Config, screen: Screen) -> RunFolder:
    """Creates a run folder with its settings, and logs the screen there; see `RunFolder.create`."""
    folder = RunFolder.create(
        run_dir,
        overwrite=config.run.overwrite,
        config=config.as_dict(),
        flags=config.as_flags(),
        show=screen.line,
    )
    screen.log_to(folder.path / "run.log")
    return folder


def wanted_views(examples: Examples, *, mirrored: bool) -> dict[int, np.ndarray]:
    """The views of images that are embedded: all images as they are; training images also mirrored, if requested.

    Returns:
        Index into `embed.VIEWS` → positions, int64 `(m,)`.
    """
    views = {0: np.flatnonzero(examples.splits >= 0)}
    return views | {1: examples.positions("train")} if mirrored else views


def count_draws(config: Config) -> int:
    """How many random draws of `--shots` a run makes."""
    return max(config.probe.repeats, config.evaluation.seeds)


class _Inspector:
    """Looks at the bytes of every file as it is read."""

    def __init__(self, *, image_size: int, lists_oddities: bool) -> None:
        self._image_size, self._lists_oddities = image_size, lists_oddities
        self.depth = DepthCheck()
        self.oddities: list[Finding] = []

    def inspect(self, example_id: str, content: bytes) -> None:
        self.depth.look(content)
        if self._lists_oddities:
            self.oddities.extend(inspect_file(example_id, content, image_size=self._image_size))


def _split(source: Source, config: Config, *, embeddings_only: bool) -> tuple[np.ndarray, list[str]]:
    """Splits of the examples, int `(n,)`, and warnings about them."""
    data = config.data
    if not embeddings_only:
        return split_source(
            source,
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            shots=data.shots,
            seed=config.run.seed,
            draws=count_draws(config),
        )
    if not (source.splits == 0).any():
        return source.splits, []
    splits = carve(
        source.ids,
        source.splits,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        labels=source.labels if source.class_names else None,
    )
    return splits, []


def _introduce(screen: Screen, source: Source, examples: Examples, warnings: Sequence[str]) -> None:
    """Shows the device, the data and what is wrong with it."""
    counts = ", ".join(f"{split} {len(examples.positions(split)):,}" for split in SPLITS)
    screen.line(f"device: {describe_device()}")
    labels = f"{counts}; {len(examples.class_names):,} classes" if source.class_names else f"{len(source.ids):,} images"
    screen.line(f"data: {source.name}: {labels}")
    for warning in warnings:
        screen.line(warning)


def _check_classes(examples: Examples) -> list[str]:
    return check_classes(examples.source.labels, examples.splits, examples.class_names)
