"""The server's OpenAPI document: it names all URLs, and what it allows never breaks the server."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mpillm.batch.endpoints import ENDPOINTS
from mpillm.serve import openapi
from tests.conftest import clean_environment
from tests.serve.serving import serving

DOCUMENT = openapi.document()
POSTS = [
    (path, one["post"]["requestBody"]["content"]["application/json"]["schema"])
    for path, one in DOCUMENT["paths"].items()
    if "application/json" in one.get("post", {}).get("requestBody", {}).get("content", {})
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    with (
        serving(tmp_path_factory.mktemp("serve"), [sys.executable], clean_environment()) as (url, _),
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield url, client._client


def test_it_is_served_and_names_all_endpoints(server: tuple[str, Any]) -> None:
    url, http = server
    assert http.get(f"{url}/openapi.json").json() == DOCUMENT
    assert {endpoint.url for endpoint in ENDPOINTS} < {path for path, _ in POSTS}
    assert "/v1/batches" in dict(POSTS)


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def values(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema of the document allows, and some that it does not."""
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return st.one_of([values(one) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "properties" in schema:
        return st.lists(st.sampled_from(sorted(schema["properties"])), max_size=3).flatmap(
            lambda keys: st.fixed_dictionaries(
                {key: values(schema["properties"][key]) for key in {*schema.get("required", ()), *keys}}
            )
        )
    low = max(schema.get("minimum", -(2**63)), -(2**63))
    high = min(schema.get("maximum", 2**63), 2**63)
    return {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(int(low), int(high)) | st.integers(0, 9),
        "number": st.floats(float(low), float(high)),
        "string": st.text(max_size=9) | st.sampled_from(["the fox", "a", "none", "auto", "json_schema"]),
        "array": st.deferred(lambda: st.lists(values(schema.get("items", {})), max_size=4)),
        "object": st.dictionaries(st.sampled_from(["role", "content", "type", "5"]), ANYTHING, max_size=3),
    }.get(str(schema.get("type")), ANYTHING)


def properties(schema: Any) -> dict[str, Any]:
    """The keys of the bodies that a reference names."""
    return dict(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"])


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """A URL and a body for it, at times with a value of any kind in it."""
    path, schema = draw(st.sampled_from(POSTS))
    body = draw(values(schema))
    keys = properties(schema)
    if draw(st.booleans()):
        body[draw(st.sampled_from(sorted(keys)))] = draw(ANYTHING)
    return path, body | ({"max_tokens": 2} if "max_tokens" in keys else {})


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(asked=bodies())
@example(asked=("/v1/completions", {"prompt": "the fox", "temperature": 2.3e-313, "max_tokens": 2}))
def test_what_it_allows_is_answered_or_refused_in_a_sentence(server: tuple[str, Any], asked: Any) -> None:
    url, http = server
    path, body = asked
    answer = http.post(f"{url}{path}", json=body)
    assert answer.status_code in (200, 400, 404), (path, body, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error", error
        assert error["code"] in (None, "model_not_found", "context_length_exceeded"), error
        keys = properties(dict(POSTS)[path]) | body
        assert error["param"] is None or re.split(r"[.\[]", error["param"])[0] in keys, error
        assert error["message"].endswith("."), error
        assert "the line" not in error["message"]


@pytest.mark.parametrize(("path", "one"), DOCUMENT["paths"].items())
def test_another_method_is_refused_with_those_that_there_are(
    server: tuple[str, Any], path: str, one: Any
) -> None:
    url, http = server
    answer = http.patch(f"{url}{path.format(id='x', name='x')}")
    assert answer.status_code == 405
    allowed = {method.strip() for method in answer.headers["allow"].split(",")} - {"HEAD"}
    assert allowed == {method.upper() for method in one}
    assert answer.json()["error"]["message"].startswith(path.partition("{")[0])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/chats", "/openapi.json lists all URLs."),
        ("/v1/responses", "use /v1/chat/completions."),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/chat/completions", "the base URL ends in /v1, so that this becomes /v1/chat/completions."),
    ],
)
def test_a_url_that_is_not_there(server: tuple[str, Any], path: str, said: str) -> None:
    url, http = server
    error = http.post(f"{url}{path}").json()["error"]
    assert (error["code"], error["message"]) == (None, f"There is no {path}; {said}")
