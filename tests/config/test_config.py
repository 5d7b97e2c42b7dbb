"""Settings: each has its flag, its help and its modes, and what is written down is read back the same."""

from __future__ import annotations

import dataclasses
import json
import pwd
import shlex
import typing
from pathlib import Path

import pytest

from tl_keras.config import (
    MODES,
    BackboneConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ProbeConfig,
    ReadConfig,
    RunConfig,
    ServeConfig,
    TrainingConfig,
    default_store_dir,
    define_flags,
    from_dict,
    nearest,
    parse_kwargs,
    read_flags,
)
from tl_keras.config.checks import check_value
from tl_keras.errors import UserError

GROUPS = (
    DataConfig,
    BackboneConfig,
    TrainingConfig,
    ProbeConfig,
    EvaluationConfig,
    EngineConfig,
    RunConfig,
    ReadConfig,
)
FIELDS = [field for group in GROUPS for field in dataclasses.fields(group)]
TYPES = {name: kind for group in GROUPS for name, kind in typing.get_type_hints(group).items()}


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def parse(*arguments: str) -> Config:
    values = define_flags()
    values(["tl_keras", *arguments])
    return read_flags(values)


def parse_file(path: Path, text: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return parse(f"--flagfile={path}")


# fields


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_has_help_modes_and_a_default_that_is_allowed(field):
    assert 3 < len(field.metadata["help"]) < 180
    assert field.metadata["modes"]
    assert set(field.metadata["modes"]) <= set(MODES)
    assert set(field.metadata["mode_defaults"]) <= set(field.metadata["modes"])
    check_value(field, field.default)
    for default in field.metadata["mode_defaults"].values():
        check_value(field, default)


def test_no_name_stands_in_two_groups():
    names = [field.name for field in FIELDS]
    assert len(set(names)) == len(names)


def test_every_field_has_a_flag_of_its_own_type():
    flags = define_flags()
    for field in FIELDS:
        flag = flags[field.name]
        assert flag.help == field.metadata["help"]
        assert flag.value == ((list(field.default) or None) if TYPES[field.name] == tuple[str, ...] else field.default)
        kinds = {TYPES[field.name], *typing.get_args(TYPES[field.name])}
        wanted = "bool" if bool in kinds else "int" if int in kinds else "float" if float in kinds else "string"
        if TYPES[field.name] != tuple[str, ...]:
            assert flag.flag_type() == wanted


@pytest.mark.parametrize("mode", MODES)
def test_a_flag_that_another_mode_uses_is_refused_by_name(mode):
    values = {bool: "true", int: "1", float: "0.5"}
    for field in FIELDS:
        kinds = {TYPES[field.name], *typing.get_args(TYPES[field.name])}
        texts = {"backbone_kwargs": "x=1", "probe": "knn", "embeddings_output": "x.npz", "compare": "x,y"}
        text = texts.get(field.name, "x")
        value = next((one for kind, one in values.items() if kind in kinds), (field.metadata["choices"] or (text,))[0])
        arguments = [f"--mode={mode}", f"--{field.name}={value}"]
        arguments += ["--classifier=x"] * (
            mode in {"evaluate", "predict", "export"} and field.name not in {"classifier", "compare"}
        )
        arguments += ["--images=x"] * (mode == "predict" and field.name != "images")
        arguments += ["--corruptions"] * (mode == "evaluate" and field.name == "corruption_images")
        if mode in field.metadata["modes"]:
            parse(*arguments)
        else:
            assert error_of(parse, *arguments).startswith(f"--{field.name} is not used by --mode={mode}. It belongs to")


def test_a_mode_has_its_own_defaults_and_only_its_own():
    assert parse("--mode=finetune").data.dataset == "stanford_dogs"
    assert parse("--mode=finetune").backbone.backbone == "ResNet50"
    assert parse("--mode=extract").backbone.backbone == "VGG16"
    assert parse("--mode=extract").probe.probe == ("logistic_regression",)
    assert parse("--mode=evaluate", "--classifier=x").data.dataset is None


def test_the_weights_of_a_run_decide_the_backbone(tmp_path):
    assert parse("--mode=finetune", f"--weights={tmp_path}").backbone.backbone is None
    assert parse("--mode=finetune", f"--weights={tmp_path}/none.h5").backbone.backbone == "ResNet50"
    assert parse("--mode=finetune", f"--weights={tmp_path}", "--backbone=VGG16").backbone.backbone == "VGG16"


def test_nothing_changes_a_config():
    settings = Config("doctor")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.mode = "predict"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.data.shots = 3


# what is written is read back


def other(name: str) -> typing.Any:
    """A value that is not the default."""
    (field,) = [field for field in FIELDS if field.name == name]
    if isinstance(field.default, bool):
        return not field.default
    return next(choice for choice in field.metadata["choices"] if choice != field.default)


FULL = Config(
    "finetune",
    data=DataConfig(
        dataset="folder:/my photos/红, 色",
        data_dir="/t f/ds",
        classes=("a,b", 'say "no"', "plain", "红 色", "it's", "#5"),
        val_fraction=1e-05,
        test_fraction=0.3333333333333333,
        shots=7,
        max_broken_fraction=0.0,
    ),
    backbone=BackboneConfig("MobileNetV2", "alpha=0.35,minimalistic=True", "none", 96, other("resize")),
    training=TrainingConfig(
        trainable="from:block_3_expand",
        epochs=3,
        batch_size=5,
        optimizer=other("optimizer"),
        learning_rate=0.1 + 0.2,
        backbone_learning_rate=3e-07,
        momentum=0.0625,
        weight_decay=1.25e-5,
        schedule=other("schedule"),
        warmup_epochs=0.375,
        label_smoothing=0.123,
        class_weights=other("class_weights"),
        augment=other("augment"),
        standardize=other("standardize"),
        dropout=0.123,
        monitor=other("monitor"),
        patience=2,
    ),
    engine=EngineConfig(other("engine"), other("precision"), "/st ore"),
    run=RunConfig("/r un/=1", other("overwrite"), other("export"), "/mo dels", "na-me", 2**31 - 1, 7),
)
READ_FULL = Config(
    "extract",
    data=DataConfig("csv:/my photos/m.csv", shots=5),
    backbone=BackboneConfig("VGG19"),
    probe=ProbeConfig(
        feature_layer=("fc1", "block5_pool"),
        pooling=other("pooling"),
        probe=("knn",),
        scale=other("scale"),
        probe_parameter=3.0,
        choose_by=other("choose_by"),
        refit=other("refit"),
        max_iter=77,
        repeats=9,
    ),
)
CONFIGS = {
    "everything": FULL,
    "extract": READ_FULL,
    "embeddings": Config(
        "extract",
        DataConfig("digits"),
        BackboneConfig("VGG16"),
        probe=ProbeConfig(embeddings_output="/out put/e,1.parquet"),
    ),
    "defaults": Config("finetune", DataConfig("digits"), BackboneConfig("SmallConvNet")),
    "predict": Config("predict", read=ReadConfig("runs/x", ("a,b.jpg", "c d/*.png", "café.jpg", "/x"), "o.csv")),
    "evaluate": Config("evaluate", DataConfig(classes=("x",)), read=ReadConfig("saved_models/x/1")),
    "export": Config("export", run=RunConfig(export_dir="m", model_name="x"), read=ReadConfig("runs/x")),
    "deploy": Config("export", serve=ServeConfig(deploy="/de ploy"), read=ReadConfig("saved_models/x/1")),
    "serve": Config(
        "serve",
        engine=EngineConfig("openvino", "float32"),
        run=RunConfig(export_dir="m", model_name="x", max_pixels=9),
        serve=ServeConfig(None, "::1", 1, 2, "/mo dels.config", 4, 14, 5, 6, 7.5, ("https://a.example", "*")),
    ),
    "doctor": Config("doctor"),
}


def test_the_fullest_config_differs_from_the_defaults_everywhere():
    for group in ("data", "backbone", "training", "engine", "run"):
        for field in dataclasses.fields(getattr(FULL, group)):
            if field.name != "resume":  # it says how a run is started, and stands in no flag file
                assert getattr(getattr(FULL, group), field.name) != field.default, field.name
    for group, kind in (("probe", ProbeConfig), ("serve", ServeConfig)):
        for field in dataclasses.fields(kind):
            values = {getattr(getattr(settings, group), field.name) for settings in CONFIGS.values()}
            assert values > {field.default}, field.name


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_flags_that_were_written_give_the_same_config(settings, tmp_path):
    text = settings.as_flags()
    assert parse(*text.splitlines()) == settings
    assert parse_file(tmp_path / "run.flags", text) == settings
    assert parse_file(tmp_path / "run.flags", text).as_flags() == text


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_the_command_of_a_report_gives_the_same_settings_for_a_new_run_folder(settings):
    program, mode, *flags = shlex.split(settings.as_command())
    assert (program, mode) == ("tl_keras", settings.mode)
    defaults = {flag.split("=")[0] for flag in flags} & {"--run_dir", "--overwrite", "--resume"}
    assert not defaults
    again = parse(f"--mode={mode}", *flags)
    kept = {name: getattr(settings.run, name) for name in ("run_dir", "overwrite", "resume")}
    assert dataclasses.replace(again, run=dataclasses.replace(again.run, **kept)) == settings


def test_the_command_of_a_report_names_what_differs_from_the_defaults():
    settings = parse("--mode=finetune", "--dataset=folder:my photos/it's", "--noreport", "--run_dir=runs/x")
    assert settings.as_command() == """tl_keras finetune '--dataset=folder:my photos/it'"'"'s' --noreport"""


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_json_that_was_written_gives_the_same_config(settings):
    assert from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_a_name_that_is_no_utf8_is_read_from_the_command_line():
    settings = Config("predict", read=ReadConfig("runs/x", ("caf\udce9.jpg", "b,\udce9")))
    assert parse(*settings.as_flags().splitlines()) == settings


def test_flags_name_what_the_mode_uses_and_nothing_else():
    lines = CONFIGS["evaluate"].as_flags().splitlines()
    used = {field.name for field in FIELDS if "evaluate" in field.metadata["modes"]}
    assert lines[0] == "--mode=evaluate"
    assert {line.split("=")[0].removeprefix("--").removeprefix("no") for line in lines[1:]} <= used
    assert "--nooverwrite" in lines
    assert not [line for line in lines if line.startswith(("--dataset", "--run_dir"))]  # None is left out


def test_lists_are_read_as_csv():
    assert parse("--mode=finetune", "--classes=a, b ,c").data.classes == ("a", "b", "c")
    assert parse("--mode=finetune", '--classes="a,b",c').data.classes == ("a,b", "c")
    assert parse("--mode=finetune", "--classes=").data.classes == ()


def test_the_last_of_two_flags_counts_and_a_file_counts_where_it_stands(tmp_path):
    (tmp_path / "x.flags").write_text("# a comment\n\n--epochs=5\n--noexport\n")
    assert parse("--mode=finetune", "--epochs=2", f"--flagfile={tmp_path}/x.flags").training.epochs == 5
    settings = parse("--mode=finetune", f"--flagfile={tmp_path}/x.flags", "--epochs=2", "--export")
    assert (settings.training.epochs, settings.run.export) == (2, True)


def test_fields_that_this_version_does_not_know_are_left_out_and_those_it_lacks_have_their_default():
    values = json.loads(json.dumps(FULL.as_dict()))
    values["training"]["mixup"] = 0.2
    values["distillation"] = {"teacher": "x"}
    assert from_dict(values) == FULL
    del values["training"]["monitor"], values["engine"]
    found = from_dict(values)
    assert found.training == dataclasses.replace(FULL.training, monitor=TrainingConfig().monitor)
    assert found.engine == EngineConfig()


def test_a_config_that_was_written_is_checked_as_any_other():
    values = FULL.as_dict()
    values["training"]["epochs"] = 0
    assert error_of(from_dict, values) == "--epochs=0 is out of range. Allowed: 1 or more."
    assert "--mode=extrakt is not known" in error_of(from_dict, {"mode": "extrakt"})


# values


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if field.metadata["minimum"] is not None], ids=lambda field: field.name
)
def test_the_bounds_of_a_range_are_allowed_and_what_is_beyond_is_not(field):
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    check_value(field, low)
    assert error_of(check_value, field, low - 1).startswith(f"--{field.name}={low - 1} is out of range.")
    if high is not None:
        check_value(field, high)
        text = error_of(check_value, field, high + 1)
        assert text == f"--{field.name}={high + 1} is out of range. Allowed: {low} to {high}."
    for value in (float("nan"), float("inf")):
        assert "is out of range" in error_of(check_value, field, value)


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if field.metadata["choices"]], ids=lambda field: field.name
)
def test_a_choice_is_one_of_those_named(field):
    for choice in field.metadata["choices"]:
        check_value(field, choice)
    text = error_of(check_value, field, "nonesuch")
    assert text.endswith(f"Allowed: {', '.join(field.metadata['choices'])}.")
    assert error_of(check_value, field, "").startswith(f"--{field.name}= is not known.")


@pytest.mark.parametrize("rate", [0, -0.1, 1001, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "backbone_learning_rate"])
def test_a_learning_rate_is_above_0(name, rate):
    training = dataclasses.replace(TrainingConfig(), **{name: rate})
    text = error_of(Config, "finetune", training=training)
    assert text == f"--{name}={rate} is out of range. Allowed: above 0, up to 1000."


@pytest.mark.parametrize("name", ["a/b", "/a", ".hidden", "..", ".", "a b", "写真", "é", "a:b", "a%20b"])
def test_a_models_name_is_one_that_tf_serving_can_be_asked_for(name):
    text = error_of(Config, "finetune", run=RunConfig(model_name=name))
    assert text.startswith(f"--model_name={name} can't be part of a TF Serving URL. Allowed: ")


def test_what_is_carved_leaves_something_to_train_on():
    Config("finetune", data=DataConfig(val_fraction=0.5, test_fraction=0.44))
    assert "leave nothing" in error_of(Config, "finetune", data=DataConfig(val_fraction=0.5, test_fraction=0.45))
    assert "leave nothing" not in error_of(Config, "finetune", data=DataConfig(val_fraction=0.95))


def test_overwrite_never_deletes_what_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x" / "classifier").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs/x")
    for folder in ("runs/x", "runs", "link", str(tmp_path / "runs" / "x")):
        replace = RunConfig(run_dir=folder, overwrite=True)
        for path in ("runs/x", "runs/x/classifier", "./link/"):
            text = error_of(Config, "evaluate", run=replace, read=ReadConfig(path))
            assert text == (
                f"--overwrite would delete --classifier={path}, which is inside --run_dir={folder}. Give another "
                "--run_dir."
            )
            text = error_of(Config, "finetune", run=replace, backbone=BackboneConfig(weights=path))
            assert text.startswith(f"--overwrite would delete --weights={path}, ")
    for folder in ("runs/xy", "runs/x/classifier", "runs/y", None):
        Config("evaluate", run=RunConfig(run_dir=folder, overwrite=True), read=ReadConfig("runs/x"))
    Config("finetune", run=RunConfig(run_dir=".", overwrite=True))  # imagenet is no file


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        ({"probe": ()}, "--probe is empty. "),
        ({"probe": ("none",)}, "--probe=none only computes embeddings. "),
        ({"probe": ("none", "knn"), "embeddings_output": "x.npz"}, "--probe=none only computes embeddings. "),
        ({"probe": ("knn", "svm")}, "--probe=svm is not known. "),
        ({"feature_layer": ("a", "b", "a")}, "--feature_layer=a,b,a lists a name twice. List each once."),
        ({"probe_parameter": 1e10}, "--probe_parameter=10000000000.0 is out of range. Allowed: 1e-09 to"),
        ({"repeats": 1001}, "--repeats=1001 is out of range. Allowed: 1 to 1000."),
        ({"embeddings_output": "x.NPZ"}, "--embeddings_output=x.NPZ has an unknown suffix. Allowed: .npz, .parquet."),
    ],
)
def test_a_probe_that_can_not_be_is_refused_before_anything_is_loaded(probe, text):
    assert error_of(Config, "extract", probe=ProbeConfig(**probe)).startswith(text)


def test_one_value_is_one_probes_and_may_be_any_number_but_of_neighbours():
    Config("extract", probe=ProbeConfig(probe=("ridge",), probe_parameter=0.3))
    Config("extract", probe=ProbeConfig(probe=("knn",), probe_parameter=3.0))
    assert "is not a number of neighbors" in error_of(
        Config, "extract", probe=ProbeConfig(probe=("knn",), probe_parameter=0.3)
    )
    assert "--probe_parameter applies to a single probe" in error_of(
        Config, "extract", probe=ProbeConfig(probe=("knn", "ridge"), probe_parameter=3.0)
    )


# small functions


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        (" , ", {}),
        ("alpha=0.35", {"alpha": 0.35}),
        (" alpha = 1e-1 , depth_multiplier=2,", {"alpha": 0.1, "depth_multiplier": 2}),
        ("minimalistic=True,x=false", {"minimalistic": True, "x": False}),
        ("a=-1", {"a": -1}),
    ],
)
def test_kwargs_are_numbers_and_truths(text, values):
    found = parse_kwargs(text)
    assert found == values
    assert [type(value) for value in found.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    "text", ["alpha", "=1", "alpha=", "alpha=x", "a=1;b=2", "a=1,b", "a=__import__('os')", "a=[1]"]
)
def test_kwargs_of_another_form_are_refused(text):
    found = error_of(parse_kwargs, text)
    assert found.startswith("--backbone_kwargs: ")
    assert "is not name=value with a number, True or False. For example: alpha=0.35." in found
    assert found == error_of(Config, "finetune", backbone=BackboneConfig(backbone_kwargs=text))


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("resnet5", ["ResNet50", "VGG16"], "Did you mean: ResNet50? "),
        ("RED", ["red", "blue"], "Did you mean: red? "),
        ("finetun", MODES, "Did you mean: finetune? "),
        ("xyz", ["red", "green"], ""),
        ("red", [], ""),
        ("", ["red"], ""),
    ],
)
def test_the_nearest_names_are_told(name, known, text):
    assert nearest(name, known) == text


def test_at_most_three_names_are_told_the_likest_first():
    found = nearest("ResNet50", ["ResNet101", "ResNet500", "resnet50", "ResNet52", "ResNet51"])
    assert found.startswith("Did you mean: resnet50, ")
    assert found.count(",") == 2


def test_the_store_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_store_dir() == "/home/someone/.cache/tl_keras"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_store_dir() == "/home/someone/.cache/tl_keras"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/my cache")
    assert default_store_dir() == "/var/my cache/tl_keras"


def nobody(uid: int) -> None:
    raise KeyError(uid)


def test_without_a_home_the_store_is_beside_the_user(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert default_store_dir() == str(tmp_path / ".tl_keras_store")


def test_the_store_is_never_a_relative_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    for cache in ("cache", "./cache", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert default_store_dir() == "/home/someone/.cache/tl_keras"


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    settings = parse("--mode=finetune", "--dataset=folder:~/photos", "--run_dir=~/run", "--weights=~/w.h5")
    assert settings.data.dataset == "folder:/home/someone/photos"
    assert (settings.run.run_dir, settings.backbone.weights) == ("/home/someone/run", "/home/someone/w.h5")
    settings = parse("--mode=extract", "--embeddings_output=~/e.npz")
    assert settings.probe.embeddings_output == "/home/someone/e.npz"
    settings = parse("--mode=predict", "--classifier=~/run", "--images=~/a.jpg,b.jpg", "--output=~/p.csv")
    assert settings.read.images == ("/home/someone/a.jpg", "b.jpg")
    assert (settings.read.classifier, settings.read.output) == ("/home/someone/run", "/home/someone/p.csv")


def test_a_folder_called_imagenet_is_no_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "runs").mkdir()
    assert parse("--mode=finetune").backbone.backbone == "ResNet50"
    assert parse("--mode=finetune", "--weights=runs").backbone.backbone is None


@pytest.mark.parametrize("flag", ["compare", "slices", "card", "classifier"])
def test_overwrite_never_deletes_a_file_that_is_read(monkeypatch, tmp_path, flag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "a").mkdir(parents=True)
    rest = ["--compare=x,run/a"] if flag == "compare" else [f"--{flag}=run/a"]
    rest += ["--classifier=x"] if flag in ("slices", "card") else []
    text = error_of(parse, "--mode=evaluate", "--run_dir=run", "--overwrite", *rest)
    assert text == f"--overwrite would delete --{flag}=run/a, which is inside --run_dir=run. Give another --run_dir."


def test_a_file_that_the_run_makes_itself_may_lie_in_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "e.npz").write_text("")
    parse("--mode=extract", "--run_dir=run", "--overwrite", "--embeddings_output=run/e.npz")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--compare=a"], "--compare needs at least two run folders: --compare=runs/A,runs/B."),
        (["--compare=a,./a"], "--compare=a,./a lists a run twice. List each run once."),
        *(
            (["--compare=a,b", flag], f"computes nothing. Leave out {flag.partition('=')[0]}.")
            for flag in ("--classifier=c", "--dataset=digits", "--slices=s.csv", "--card=c", "--target_accuracy=0.9")
        ),
        (["--compare=a,b", "--corruptions"], "computes nothing. Leave out --corruptions."),
        (
            ["--classifier=c", "--corruption_images=7"],
            "--corruption_images has no effect without --corruptions. Give both",
        ),
    ],
)
def test_flags_of_evaluate_that_would_do_nothing_are_errors(flags, text):
    assert text in error_of(parse, "--mode=evaluate", *flags)


@pytest.mark.parametrize(
    "flag", ["--dataset=folder:run/photos", "--store_dir=run/s", "--export_dir=run/m", "--data_dir=run"]
)
def test_overwrite_never_deletes_what_is_read_or_kept(monkeypatch, tmp_path, flag):
    monkeypatch.chdir(tmp_path)
    name, _, path = flag.partition("=")
    (tmp_path / path.removeprefix("folder:")).mkdir(parents=True, exist_ok=True)
    text = error_of(parse, "--mode=finetune", "--run_dir=run", "--overwrite", flag)
    assert text.startswith(f"--overwrite would delete {name}=")
