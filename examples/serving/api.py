"""What requests and answers look like: the fields and errors of the APIs of OpenAI and text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import orjson
from batching import OverloadedError
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fastbert.errors import FastbertError
from fastbert.text.checks import SURROGATE

Kind = Literal["invalid", "empty", "too long", "overloaded", "backend", "unhealthy", "no model", "no path"]
# Of an error: its HTTP status, its type in text-embeddings-inference, its type and code in OpenAI's API.
ERRORS: dict[Kind, tuple[int, str, str, str | None]] = {
    "invalid": (422, "Validation", "invalid_request_error", None),
    "empty": (400, "Empty", "invalid_request_error", None),
    "too long": (413, "Validation", "invalid_request_error", "context_length_exceeded"),
    "overloaded": (429, "Overloaded", "rate_limit_error", "rate_limit_exceeded"),
    "backend": (424, "Backend", "server_error", None),
    "unhealthy": (503, "Unhealthy", "server_error", None),
    "no model": (404, "Validation", "invalid_request_error", "model_not_found"),
    "no path": (404, "Validation", "invalid_request_error", None),
}
GONE = 499  # nginx's status for a client that closed the connection: nobody reads it, the metrics count it
SHOWN_ERRORS = 3
SHOWN_CHARACTERS = 1000  # of a message, which may quote a request of millions

T = TypeVar("T")
# A list of which only the first wrong item is an error: pydantic keeps a kilobyte of each.
List = Annotated[list[T], Field(fail_fast=True)]


class Body(BaseModel):
    """What a request says. A field that we don't know is an error and not passed over."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def few_unknown(cls, body: Any) -> Any:
        """Of the fields that we don't know only those that the answer names, as each is an error."""
        if not isinstance(body, dict):
            return body
        unknown = islice((name for name in body if name not in cls.model_fields), SHOWN_ERRORS)
        return {name: body[name] for name in (*cls.model_fields, *unknown) if name in body}


Inputs = str | List[str] | List[int] | List[List[int]]
Columns = Annotated[int, Field(ge=1)]
End = Literal["right", "Right"]  # the only one that is cut off


class EmbeddingsBody(Body):
    """Of OpenAI's /v1/embeddings."""

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Columns | None = None
    user: str | None = None


class EmbedBody(Body):
    """Of text-embeddings-inference's /embed."""

    inputs: Inputs
    truncate: bool | None = None
    truncation_direction: End = "right"
    prompt_name: str | None = None
    normalize: bool = True
    dimensions: Columns | None = None


class RerankBody(Body):
    """Of text-embeddings-inference's /rerank."""

    query: str
    texts: List[str]
    truncate: bool | None = None
    truncation_direction: End = "right"
    raw_scores: bool = False
    return_text: bool = False


class PredictBody(Body):
    """Of text-embeddings-inference's /predict: a text, a pair of texts, or a list of such in lists of one or two."""

    inputs: str | List[str] | List[List[str]]
    truncate: bool | None = None
    truncation_direction: End = "right"
    raw_scores: bool = False


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, kind: Kind, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message
        self.retry_after = retry_after


class GoneError(Exception):
    """The client closed the connection before it had its answer."""


def json(value: Any) -> Response:
    """A response of JSON; numpy's arrays and numbers are written as they are."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def refusal(path: str, refused: RefusedError) -> Response:
    """The response of an error: in OpenAI's shape below /v1/, elsewhere in text-embeddings-inference's."""
    status, theirs, openai, code = ERRORS[refused.kind]
    message = SURROGATE.sub("\ufffd", refused.message[:SHOWN_CHARACTERS])  # it may quote the request
    message += "..." if len(refused.message) > SHOWN_CHARACTERS else ""
    if path.startswith("/v1/"):
        response = json({"error": {"message": message, "type": openai, "param": None, "code": code}})
        status = 400 if status == 422 else status  # OpenAI knows no 422
    else:
        response = json({"error": message, "error_type": theirs})
    response.status_code = status
    if refused.retry_after is not None:
        response.headers["Retry-After"] = str(refused.retry_after)
    return response


def _refused(request: Request, error: RefusedError) -> Response:
    return refusal(request.url.path, error)


def _overloaded(request: Request, error: OverloadedError) -> Response:
    return refusal(request.url.path, RefusedError("overloaded", str(error), error.retry_after))


def _not_ours(request: Request, error: FastbertError) -> Response:
    return refusal(request.url.path, RefusedError("invalid", str(error)))


def _gone(request: Request, error: GoneError) -> Response:
    return Response(status_code=GONE)


def _invalid(request: Request, error: RequestValidationError) -> Response:
    found = []
    for one in error.errors()[:SHOWN_ERRORS]:
        field = ".".join(map(str, one["loc"][1:])) if one["type"] != "json_invalid" else ""
        found.append(f"{field or 'the body'}: {one['msg']}")
    return refusal(request.url.path, RefusedError("invalid", "; ".join(found)))


def _http(request: Request, error: HTTPException) -> Response:
    """What the framework itself says: no such path, another method, a body that is too long or no JSON."""
    kinds: dict[int, Kind] = {404: "no path", 413: "too long"}
    response = refusal(request.url.path, RefusedError(kinds.get(error.status_code, "invalid"), str(error.detail)))
    response.status_code = error.status_code
    return response


def _unforeseen(request: Request, error: Exception) -> Response:
    """uvicorn logs the traceback."""
    response = refusal(request.url.path, RefusedError("backend", f"{type(error).__name__}; the server's log has more"))
    response.status_code = 500
    return response


ANSWERS: dict[type[Exception], Callable[[Request, Any], Response]] = {
    RefusedError: _refused,
    OverloadedError: _overloaded,
    FastbertError: _not_ours,
    GoneError: _gone,
    RequestValidationError: _invalid,
    HTTPException: _http,
    Exception: _unforeseen,
}
