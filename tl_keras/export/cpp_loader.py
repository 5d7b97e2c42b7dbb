"""TensorFlow's C++ loader of SavedModels, as used by TensorFlow Serving, called through TensorFlow's C API.

Linux wheels of TensorFlow contain it as `libtensorflow_cc`. This module imports neither TensorFlow's Python package nor
Keras.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LIBRARIES = ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2")  # in this order: the second depends on the first
_TYPES = {1: np.float32, 9: np.int64, 10: np.bool_}  # numbers of TensorFlow's enum DataType
_STRING = 7
_STRING_BYTES = 24  # size of a TF_TString
_VIEW = 3  # kind of a TF_TString that does not own its bytes
_TAG = b"serve"

_Pointer = ctypes.c_void_p


class _Output(ctypes.Structure):
    """One output of an operation, as the C API's TF_Output."""

    _fields_ = (("operation", _Pointer), ("index", ctypes.c_int))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "TF_NewStatus": (_Pointer, []),
    "TF_DeleteStatus": (None, [_Pointer]),
    "TF_GetCode": (ctypes.c_int, [_Pointer]),
    "TF_Message": (ctypes.c_char_p, [_Pointer]),
    "TF_NewSessionOptions": (_Pointer, []),
    "TF_DeleteSessionOptions": (None, [_Pointer]),
    "TF_NewGraph": (_Pointer, []),
    "TF_DeleteGraph": (None, [_Pointer]),
    "TF_LoadSessionFromSavedModel": (
        _Pointer,
        [_Pointer, _Pointer, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, *[_Pointer] * 3],
    ),
    "TF_CloseSession": (None, [_Pointer, _Pointer]),
    "TF_DeleteSession": (None, [_Pointer, _Pointer]),
    "TF_GraphOperationByName": (_Pointer, [_Pointer, ctypes.c_char_p]),
    "TF_AllocateTensor": (
        _Pointer,
        [ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.c_int, ctypes.c_size_t],
    ),
    "TF_DeleteTensor": (None, [_Pointer]),
    "TF_TensorData": (_Pointer, [_Pointer]),
    "TF_TensorByteSize": (ctypes.c_size_t, [_Pointer]),
    "TF_TensorType": (ctypes.c_int, [_Pointer]),
    "TF_NumDims": (ctypes.c_int, [_Pointer]),
    "TF_Dim": (ctypes.c_int64, [_Pointer, ctypes.c_int]),
    "TF_SessionRun": (
        None,
        [
            *[_Pointer] * 2,
            *[ctypes.POINTER(_Output), ctypes.POINTER(_Pointer), ctypes.c_int] * 2,
            *[_Pointer, ctypes.c_int, _Pointer, _Pointer],
        ],
    ),
}


def find_libraries() -> list[Path]:
    """Finds the libraries of the installed TensorFlow with its C++ loader; empty if the wheel does not have them."""
    spec = importlib.util.find_spec("tensorflow")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(folder) / name for folder in folders[:1] for name in _LIBRARIES]
    return paths if paths and all(map(os.path.isfile, paths)) else []


class CppModel:
    """A SavedModel in a session of TensorFlow's C++ runtime."""

    def __init__(self, library: Any, folder: str, *, feed: str, fetches: Mapping[str, str]) -> None:
        """Loads the model.

        Args:
            library: from `load_library`.
            folder: the version folder.
            feed: name of the input tensor, `operation:index`; a string `(n,)`.
            fetches: name of the output → name of its tensor; float32, int64 or bool tensors.

        Raises:
            RuntimeError: TensorFlow can't load it, with TensorFlow's message.
        """
        self._library = library
        self._graph = library.TF_NewGraph()
        options, status = library.TF_NewSessionOptions(), library.TF_NewStatus()
        tags = (ctypes.c_char_p * 1)(_TAG)
        try:
            self._session = library.TF_LoadSessionFromSavedModel(
                options, None, os.fsencode(folder), tags, 1, self._graph, None, status
            )
            self._check(status)
        finally:
            library.TF_DeleteStatus(status)
            library.TF_DeleteSessionOptions(options)
        self._feed = self._find(feed)
        self._fetches = {name: self._find(tensor) for name, tensor in fetches.items()}

    def run(self, values: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Runs a batch.

        Args:
            values: n strings, n at least 1.

        Returns:
            Name of the output → array `(n, ...)`.

        Raises:
            RuntimeError: TensorFlow can't run the batch, with TensorFlow's message.
        """
        library, count = self._library, len(self._fetches)
        buffers = [ctypes.create_string_buffer(value, max(len(value), 1)) for value in values]
        tensor = self._make_strings([
            (ctypes.addressof(one), len(value)) for one, value in zip(buffers, values, strict=True)
        ])
        found, status = (_Pointer * count)(), library.TF_NewStatus()
        try:
            library.TF_SessionRun(
                *(self._session, None),
                *((_Output * 1)(self._feed), (_Pointer * 1)(tensor), 1),
                *((_Output * count)(*self._fetches.values()), found, count),
                *(None, 0, None, status),
            )
            self._check(status)
            return dict(zip(self._fetches, map(self._take, found), strict=True))
        finally:
            library.TF_DeleteStatus(status)
            library.TF_DeleteTensor(tensor)

    def close(self) -> None:
        """Ends the session and frees its memory."""
        status = self._library.TF_NewStatus()
        self._library.TF_CloseSession(self._session, status)
        self._library.TF_DeleteSession(self._session, status)
        self._library.TF_DeleteGraph(self._graph)
        self._library.TF_DeleteStatus(status)

    def _find(self, tensor: str) -> _Output:
        name, _, index = tensor.partition(":")
        operation = self._library.TF_GraphOperationByName(self._graph, name.encode())
        if not operation:
            raise RuntimeError(f"the graph has no operation {name}")
        return _Output(operation, int(index or 0))

    def _make_strings(self, views: Sequence[tuple[int, int]]) -> Any:
        """Makes a string tensor `(n,)` from n addresses and lengths, without copying the bytes."""
        size = _STRING_BYTES * len(views)
        tensor = self._library.TF_AllocateTensor(_STRING, (ctypes.c_int64 * 1)(len(views)), 1, size)
        content = b"".join(struct.pack("<QQQ", length << 2 | _VIEW, address, 0) for address, length in views)
        ctypes.memmove(self._library.TF_TensorData(tensor), content, size)
        return tensor

    def _take(self, tensor: Any) -> np.ndarray:
        """Copies a tensor into an array, and frees it."""
        library = self._library
        shape = [library.TF_Dim(tensor, axis) for axis in range(library.TF_NumDims(tensor))]
        content = ctypes.string_at(library.TF_TensorData(tensor), library.TF_TensorByteSize(tensor))
        array = np.frombuffer(content, _TYPES[library.TF_TensorType(tensor)]).reshape(shape)
        library.TF_DeleteTensor(tensor)
        return array

    def _check(self, status: Any) -> None:
        if self._library.TF_GetCode(status):
            raise RuntimeError(self._library.TF_Message(status).decode("utf-8", "replace"))


def load_library(paths: Sequence[Path]) -> Any:
    """Loads TensorFlow's C API into this process.

    Args:
        paths: from `find_libraries`.

    Returns:
        The library with declared functions.

    Raises:
        OSError: the libraries can't be loaded.
    """
    library: Any = None
    for path in paths:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
