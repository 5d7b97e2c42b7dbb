"""The model card (Mitchell et al. 2019), with the metadata block that the Hugging Face Hub reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_keras.config import nearest
from tl_keras.errors import UserError

# what a user may say, with what stands there where nothing was said
FIELDS = {
    "description": "",
    "intended_use": "Not stated. Who is to use this classifier, for what?",
    "out_of_scope": "Not stated. What must it not be used for?",
    "data": "Not stated. Where do the images come from, who labelled them, and may they be used?",
    "limits": "Not stated. On which images is it known to fail?",
    "ethics": "Not stated. Whom may a wrong answer harm?",
    "licence": "",
    "authors": "",
    "contact": "",
    "citation": "",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What the user says of the classifier.

    Attributes:
        said: field of `FIELDS` → text.
    """

    said: Mapping[str, str]

    def text(self, field: str) -> str:
        """What the user said, or that nothing was said."""
        return self.said.get(field, "") or FIELDS[field]

    def is_said(self, field: str) -> bool:
        """Whether the user said anything."""
        return bool(self.said.get(field))


def load_card(path: str | None) -> Card:
    """Reads `--card`: a JSON object whose fields are those of `FIELDS`, each a text.

    Raises:
        UserError: no such file, no JSON object, a field that is not known, or one that is no text.
    """
    if not path:
        return Card({})
    allowed = f"Allowed: {', '.join(FIELDS)}."
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--card={path} can't be read: {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--card={path} is no JSON: {error}. Names and texts stand in double quotes, with commas between fields."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f'--card={path} is no JSON object. Write {{"intended_use": "...", ...}}. {allowed}')
    for name, value in content.items():
        if name not in FIELDS:
            raise UserError(f"--card={path}: the field {name!r} is not known. {nearest(name, FIELDS)}{allowed}")
        if not isinstance(value, str):
            raise UserError(f"--card={path}: the field {name!r} is no text. Put it in quotes.")
    return Card({name: value.strip() for name, value in content.items()})


def describe_metadata(
    card: Card, *, name: str, backbone: str, dataset: str, split: str, figures: Mapping[str, Any]
) -> str:
    """The metadata block's lines: YAML whose values are JSON, which YAML 1.2 contains.

    Args:
        card: what the user said.
        name: of the classifier.
        backbone: the network; empty where it is not known.
        dataset: the source's name.
        split: that the figures are of.
        figures: what `measure` gives for it.
    """
    measured = [
        {"type": "accuracy", "value": round(figures["accuracy"], 4), "name": f"{split} accuracy"},
        {"type": "f1", "value": round(figures["macro"]["f1"], 4), "name": f"{split} F1, mean over classes"},
    ]
    data = {"name": dataset, "type": dataset, "split": split}
    result = {"task": {"type": "image-classification", "name": "Image classification"}, "dataset": data}
    block: dict[str, Any] = {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "tags": [
            "tl_keras",
            "keras",
            "tensorflow",
            "image-classification",
            "transfer-learning",
            *filter(None, [backbone]),
        ],
        "metrics": ["accuracy", "f1"],
        "model-index": [{"name": name, "results": [{**result, "metrics": measured}]}],
    }
    if card.is_said("licence"):
        block = {"license": card.text("licence"), **block}
    return "\n".join(f"{key}: {_as_yaml(value)}" for key, value in block.items())


def _as_yaml(value: Any) -> str:
    """JSON without the few letters that a string in YAML may not hold as they are."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda found: f"\\u{ord(found[0]):04x}", text)
