"""Schemathesis asks everything that our OpenAPI document allows, and much that it does not: no 5xx, no hang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from tests.server.local import make_engine, settle, thread

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
TRANSLATED = ("/v1/responses", "/v1/messages", "/api/")  # to chats, which are asked more often
ENDLESS = "/v1/cache/stream"  # it never ends, so there is no answer to look at


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with thread(make_engine(num_blocks=8, max_num_seqs=16), max_queue=16, request_timeout=60) as server:
        yield server
        settle(server.engine)
        assert server.cache.used_block_count == 0
        server.cache.check()


@pytest.fixture(scope="module")
def operations(served: Any) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json").exclude(path=ENDLESS)
    found = [result.ok() for result in schema.get_all_operations()]
    assert {"POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models"} <= {each.label for each in found}
    return found


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_nothing_breaks_it(served: Any, operations: list[Any], mode: GenerationMode) -> None:
    asked: Counter[str] = Counter()
    for operation in operations:
        try:
            strategy = operation.as_strategy(generation_mode=mode)
            few = 8 if operation.path.startswith(TRANSLATED) else 20
            _ask(served, strategy, few if operation.method == "post" else 3, asked)
        except (Unsatisfiable, schemathesis.errors.InvalidSchema):
            assert mode is GenerationMode.NEGATIVE  # what takes nothing cannot be asked wrongly
    assert all(asked[path] >= 15 for path in ("/v1/completions", "/v1/chat/completions", "/detokenize")), asked


def _ask(served: Any, strategy: Any, examples: int, asked: Counter[str]) -> None:
    @given(case=strategy)
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        case.call_and_validate(base_url=served.url, timeout=60, checks=CHECKS)
        asked[case.path] += 1

    ask()
