"""The list of models in the format of TF Serving (model_server_config.proto), from a file or a request."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from tl_keras.errors import UserError
from tl_keras.serving.errors import RequestError, invalid
from tl_keras.serving.models import ModelEntry

_PLATFORM = "tensorflow"


def read_config(config: model_server_config_pb2.ModelServerConfig) -> list[ModelEntry]:
    """Reads the models of a list.

    Raises:
        RequestError: it is not a list, or an entry has no name, no folder, or another platform.
    """
    if config.WhichOneof("config") != "model_config_list":
        raise invalid(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
            "supported"
        )
    entries = []
    for one in config.model_config_list.config:
        if not one.name or not one.base_path:
            raise invalid("a model's config needs name and base_path")
        _check_platform(one)
        policy = one.model_version_policy.WhichOneof("policy_choice")
        versions = tuple(one.model_version_policy.specific.versions) if policy == "specific" else ()
        latest = 0 if policy == "all" else one.model_version_policy.latest.num_versions or 1
        entries.append(ModelEntry(one.name, Path(one.base_path), versions, latest, dict(one.version_labels)))
    return entries


def _check_platform(config: model_server_config_pb2.ModelConfig) -> None:
    """Checks the platform of a model.

    Raises:
        RequestError: it is not TensorFlow.
    """
    if config.model_platform not in {"", _PLATFORM} or config.model_type == model_server_config_pb2.OTHER:
        platform = config.model_platform or "OTHER"
        raise invalid(
            f'model {config.name} requests unsupported platform {platform}: model_platform must be "{_PLATFORM}"'
        )


def read_config_file(path: Path) -> list[ModelEntry]:
    """Reads the models of a file in the text format of protobuf.

    Raises:
        UserError: the file can't be read, or is not a list of models.
    """
    config = model_server_config_pb2.ModelServerConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except OSError as error:
        raise UserError(f"--models_config={path} can't be read: {error.strerror}. Check the path.") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise UserError(
            f"--models_config={path} is not a valid --model_config_file of TF Serving: {error}. Correct the file."
        ) from error
    try:
        entries = read_config(config)
    except RequestError as error:
        raise UserError(f"--models_config={path}: {error.message}. Correct the file.") from error
    if not entries:
        raise UserError(f"--models_config={path} lists no models. Add one.")
    return entries
