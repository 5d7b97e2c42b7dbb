"""Errors of requests, with the codes of gRPC and TF Serving."""

from __future__ import annotations

import re

import grpc

_HTTP = {  # tensorflow_serving/model_servers/http_server.cc, ToHTTPStatusCode
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
_FOLDERS = re.compile(r"(?<![^\s'\"(=:\[])(?!//)(?:[A-Za-z]:)?[/\\](?:[^/\\\s:;,'\"]+[/\\])*")  # an absolute path
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


class RequestError(Exception):
    """A request that can't be answered, with a code and a message for the client."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        """Args: code: gRPC code; message: message for the client."""
        super().__init__(message)
        self.code, self.message = code, message

    @property
    def http_status(self) -> int:
        """The HTTP status of TF Serving for this code."""
        return _HTTP.get(self.code, 500)


def invalid(message: str) -> RequestError:
    """Creates the error for an invalid request (400)."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


def precondition(message: str) -> RequestError:
    """Creates the error for a request that does not suit the model."""
    return RequestError(grpc.StatusCode.FAILED_PRECONDITION, message)


def not_found(message: str) -> RequestError:
    """Creates the error for a missing model or version (404)."""
    return RequestError(grpc.StatusCode.NOT_FOUND, message)


def code_of(number: int) -> grpc.StatusCode:
    """The gRPC code for a number of TensorFlow; both have the same numbering."""
    return _BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def clear_tracebacks(error: BaseException) -> None:
    """Removes the tracebacks of an error and of its causes, once the error is answered.

    A traceback holds frames, a frame its task, and the task the error. This reference cycle would keep the request's
    body in memory until Python's garbage collector runs, which may be never.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            found.__traceback__ = None
            waiting += [found.__cause__, found.__context__]


def expired(what: str) -> RequestError:
    """Creates the error for a deadline that passed (504)."""
    return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the deadline passed before {what}")


def hide_folders(message: str) -> str:
    """Removes the folders of absolute paths from a message for clients."""
    return _FOLDERS.sub("", message)
