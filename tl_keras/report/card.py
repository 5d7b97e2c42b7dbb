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

# fields of --card, with the text that is shown if a field is not given
FIELDS = {
    "description": "",
    "intended_use": "Not stated. Who should use this classifier, and for which purpose?",
    "out_of_scope": "Not stated. For which purposes must this classifier not be used?",
    "data": "Not stated. Where do the images come from, who labeled them, and under which terms may they be used?",
    "limits": "Not stated. On which images is the classifier known to fail?",
    "ethics": "Not stated. Who could be harmed by a wrong prediction?",
    "license": "",
    "authors": "",
    "contact": "",
    "citation": "",
}
TITLES = {
    "description": "Description",
    "intended_use": "Intended use",
    "out_of_scope": "Out-of-scope use",
    "data": "Data",
    "limits": "Limitations",
    "ethics": "Ethical considerations",
    "license": "License",
    "authors": "Authors",
    "contact": "Contact",
    "citation": "Citation",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """The user's entries of the model card.

    Attributes:
        entries: field of `FIELDS` → text.
    """

    entries: Mapping[str, str]

    def text(self, field: str) -> str:
        """The user's entry, or the text for a missing one."""
        return self.entries.get(field, "") or FIELDS[field]

    def has(self, field: str) -> bool:
        """Whether the user gave the field a text."""
        return bool(self.entries.get(field))


def load_card(path: str | None) -> Card:
    """Loads the file of `--card`: a JSON object that maps fields of `FIELDS` to strings.

    Raises:
        UserError: the file is missing or not a JSON object, a field is unknown, or a value is not a string.
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
            f"--card={path} is not valid JSON: {error}. Put names and texts in double quotes, commas between fields."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f'--card={path} is not a JSON object. Write {{"intended_use": "...", ...}}. {allowed}')
    if "licence" in content:  # the British spelling
        content["license"] = content.pop("licence")
    for name, value in content.items():
        if name not in FIELDS:
            raise UserError(f"--card={path}: the field {name!r} is unknown. {nearest(name, FIELDS)}{allowed}")
        if not isinstance(value, str):
            raise UserError(f"--card={path}: the field {name!r} is not a string. Put its value in double quotes.")
    return Card({name: value.strip() for name, value in content.items()})


def format_hub_metadata(
    card: Card, *, name: str, backbone: str, dataset: str, split: str, figures: Mapping[str, Any]
) -> str:
    """Makes the lines of the metadata block: YAML with values in JSON, which is a subset of YAML 1.2.

    Args:
        card: the user's entries.
        name: name of the classifier.
        backbone: name of the network; empty if unknown.
        dataset: name of the data set.
        split: the split of the metrics.
        figures: result of `measure` for this split.
    """
    measured = [
        {"type": "accuracy", "value": round(figures["accuracy"], 4), "name": f"{split} accuracy"},
        {"type": "f1", "value": round(figures["macro"]["f1"], 4), "name": f"{split} macro F1"},
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
    if card.has("license"):
        block = {"license": card.text("license"), **block}
    return "\n".join(f"{key}: {_as_yaml(value)}" for key, value in block.items())


def _as_yaml(value: Any) -> str:
    """Formats a value as JSON, and escapes the characters that YAML does not allow in strings."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda found: f"\\u{ord(found[0]):04x}", text)
