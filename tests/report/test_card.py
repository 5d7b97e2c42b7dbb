"""The model card: what users say, what is refused, and what the Hub reads."""

from __future__ import annotations

import json

import pytest

from tl_keras.errors import UserError
from tl_keras.report.card import FIELDS, Card, format_hub_metadata, load_card

FIGURES = {"accuracy": 0.91503, "macro": {"f1": 0.9}}


def write(tmp_path, content: object) -> str:
    path = tmp_path / "card.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_missing_fields_get_a_placeholder(tmp_path):
    card = load_card(write(tmp_path, {"intended_use": " Sorting ants. ", "authors": ""}))
    assert card.text("intended_use") == "Sorting ants."
    assert card.has("intended_use")
    assert not card.has("authors")
    assert card.text("limits") == FIELDS["limits"]
    assert load_card(None).entries == {}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1], 'is not a JSON object. Write {"intended_use": "...", ...}. Allowed: description, intended_use,'),
        ({"intended": "x"}, "the field 'intended' is unknown. Did you mean: intended_use"),
        ({"limits": 3}, "the field 'limits' is not a string. Put its value in double quotes."),
        ("{", "card.json is not valid JSON: Expecting property name enclosed in double quotes"),
    ],
)
def test_mistakes(tmp_path, content, text):
    with pytest.raises(UserError) as caught:
        load_card(write(tmp_path, content))
    assert text in str(caught.value)


def test_a_windows_editors_mark_is_no_mistake_and_nesting_without_end_is_one(tmp_path):
    path = tmp_path / "card.json"
    path.write_text('{"limits": "few"}', encoding="utf-8-sig")
    assert load_card(str(path)).entries == {"limits": "few"}
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        load_card(str(path))


def test_letters_that_yaml_does_not_take_come_back(tmp_path):
    import yaml

    name = "a\x7fb\x85c\u2028d\U0001f41ce\ufeff"
    block = format_hub_metadata(Card({}), name=name, backbone="b", dataset="d", split="test", figures=FIGURES)
    assert yaml.safe_load(block)["model-index"][0]["name"] == name


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"--card=.*no\.json can't be read: No such file or directory. Check the path."):
        load_card(str(tmp_path / "no.json"))


def test_the_hub_reads_the_metadata_block():
    from huggingface_hub import ModelCard

    card = Card({"license": "apache-2.0"})
    block = format_hub_metadata(
        card, name='odd "name": # 1', backbone="ResNet50", dataset="stanford_dogs", split="test", figures=FIGURES
    )
    data = ModelCard(f"---\n{block}\n---\n\n# Card\n").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "keras", "image-classification")
    assert "transfer-learning" in data.tags
    accuracy, f1 = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", 0.915, "test")
    assert (f1.metric_type, f1.dataset_name, f1.task_type) == ("f1", "stanford_dogs", "image-classification")
    assert data.model_name == 'odd "name": # 1'
    assert "license" not in format_hub_metadata(
        Card({}), name="n", backbone="b", dataset="d", split="test", figures=FIGURES
    )
