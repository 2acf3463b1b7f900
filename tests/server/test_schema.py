"""What the OpenAPI document says is what the server does: requests made up from it by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.fakes import FakeEngine
from tests.server.live import live


@pytest.fixture(scope="module")
def operations() -> Iterator[list[Any]]:
    with live(FakeEngine()) as server:
        document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        yield [found.ok() for found in document.get_all_operations()]


@pytest.mark.slow
def test_the_document_is_kept(operations: list[Any]) -> None:
    """No 5xx, no status and no body that the document does not have. (It cannot say which fields go together, so that
    valid requests may be refused.)"""
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    asked = set()
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        def holds(case: Any) -> None:
            asked.add(case.operation.label)
            case.call_and_validate(checks=checks)

        holds()
    assert {"POST /v1/chat/completions", "POST /v1/responses", "GET /metrics"} <= asked
