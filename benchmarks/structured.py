"""Structured output: whether answers to random JSON Schemas validate, and what following one costs a token.

The shipped model answers 200 random schemas (tests/schemas.py, seeded) greedily and at temperature 1; each answer has
to end by itself, parse, and validate, formats included. Beside each of them the same number of tokens is written as
free text from the same prompt, so that both meet the same machine; times are processor times of all threads. So for
batches of 16. With ``--suite``, a checkout of the JSON-Schema-Test-Suite, its schemas of draft 2020-12 are answered,
too: those that are refused are counted, and answers that are cut after 300 tokens.

    python benchmarks/structured.py [--schemas N] [--suite FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs

from pagedkv.engine import LLM, RequestOutput, SamplingParams, Structured
from pagedkv.errors import InvalidOperation
from pagedkv.models import shipped_model_path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.schemas import random_schema

Row = dict[str, Any]
PROMPT = "record = "
BATCH = 16


def follows(text: str, schema: Any) -> bool:
    """Tell whether a text is JSON that validates."""
    try:
        jsonschema_rs.validator_for(schema, validate_formats=True).validate(json.loads(text))
    except (ValueError, jsonschema_rs.ValidationError):
        return False
    return True


class Clock:
    """Processor time and tokens of two ways to write."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def generate(self, llm: LLM, way: str, params: list[SamplingParams]) -> list[RequestOutput]:
        """Write a text for each of some parameters at once, on the clock."""
        started = time.process_time()
        outputs = llm.generate([PROMPT] * len(params), params)
        self.seconds[way] += time.process_time() - started
        self.tokens[way] += sum(len(output.outputs[0].token_ids) for output in outputs)
        return outputs

    def microseconds(self, way: str) -> float:
        """Return the time of a token."""
        return self.seconds[way] / self.tokens[way] * 1e6

    def rows(self, name: str) -> list[Row]:
        """Return what a token takes, structured and free."""
        structured, free = self.microseconds("structured"), self.microseconds("free")
        return [
            row(f"{name}: processor time of a structured token", structured, "µs"),
            row(f"{name}: of a token of free text beside it", free, "µs"),
            row(f"{name}: structured to free", structured / free, "×"),
        ]


def row(
    name: str, value: float, unit: str, target: float | None = None, met: bool | None = None, note: str = ""
) -> Row:
    """Return a row of the page."""
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, "note": note}


def exam(llm: LLM, count: int) -> list[Row]:
    """Answer random schemas one by one, greedily and drawn, each beside free text."""
    clock, right, ended = Clock(), 0, 0
    for seed in range(count):
        schema = random_schema(seed)
        structured = Structured(json=schema)
        for temperature in (0.0, 1.0):
            drawn: dict[str, Any] = {"temperature": temperature, "seed": seed}
            (output,) = clock.generate(
                llm, "structured", [SamplingParams(structured=structured, max_tokens=3000, **drawn)]
            )
            text = output.outputs[0]
            clock.generate(llm, "free", [SamplingParams(max_tokens=len(text.token_ids), ignore_eos=True, **drawn)])
            ended += text.finish_reason == "stop"
            right += follows(text.text, schema)
    asked = 2 * count
    note = f"{ended} ended by themselves"
    return [
        row(f"answers to {count} schemas that validate, of {asked}", right, "", asked, right == asked, note),
        *clock.rows("alone"),
    ]


def batches(llm: LLM, count: int) -> list[Row]:
    """Answer random schemas in batches, each beside free text of the same lengths."""
    clock = Clock()
    for first in range(0, count, BATCH):
        params = [
            SamplingParams(structured=Structured(json=random_schema(seed)), max_tokens=100, temperature=1.0, seed=seed)
            for seed in range(first, first + BATCH)
        ]
        outputs = clock.generate(llm, "structured", params)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        free = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=1.0, seed=n) for n in lengths]
        clock.generate(llm, "free", free)
    return clock.rows(f"{BATCH} at once")


def suite(llm: LLM, folder: Path) -> list[Row]:
    """Answer the schemas of a checkout of the JSON-Schema-Test-Suite."""
    counted: Counter[str] = Counter()
    for file in sorted((folder / "tests" / "draft2020-12").glob("*.json")):
        for group in json.loads(file.read_text()):
            try:
                text = llm.generate(
                    PROMPT,
                    SamplingParams(
                        structured=Structured(json=json.dumps(group["schema"])), max_tokens=300, temperature=0.7, seed=1
                    ),
                )[0].outputs[0]
            except InvalidOperation:
                counted["refused"] += 1
                continue
            is_right = follows(text.text, group["schema"])
            if text.finish_reason == "length":
                counted["cut"] += 1
            else:
                counted["right" if is_right else "wrong"] += 1
                if not is_right:
                    print(f"{file.name}, {group['description']}: {text.text}", file=sys.stderr)
    asked = counted["right"] + counted["wrong"]
    note = f"{counted['refused']} schemas are refused, {counted['cut']} answers were cut"
    return [
        row(
            f"JSON-Schema-Test-Suite: answers that validate, of {asked}",
            counted["right"],
            "",
            asked,
            not counted["wrong"],
            note,
        )
    ]


def main() -> None:
    """Run it and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    llm = LLM(shipped_model_path(), num_blocks=2048)
    llm.warm_up()
    llm.generate(PROMPT, SamplingParams(structured=Structured(json=True), max_tokens=8, temperature=1.0))
    rows = exam(llm, arguments.schemas) + batches(llm, arguments.schemas)
    if arguments.suite is not None:
        rows += suite(llm, arguments.suite)
    for each in rows:
        print(f"{each['name']}: {each['value']:.2f} {each['unit']} {each['note']}".rstrip())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
