"""lm-eval's local-completions: log likelihoods by echo, and texts."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from tests.clients.conftest import KEY, MODEL
from tests.server.local import Process

from pagedkv.models import shipped_model_path

LINES = [
    ("import os\nimport", [" sys", " purple"]),
    ("def f(x):\n    return", [" x", " the the"]),
    ("for i in", [" range(10):", " of of of:"]),
    ("if x is not", [" None:", " twelve:"]),
    ("try:\n    pass\nexcept", [" ValueError:", " bananas:"]),
    ("with open(path)", [" as f:", " and walk:"]),
    ("while", [" True:", " ):):"]),
    ("class A:\n    def", [" __init__(self):", " in is not:"]),
    ("x = [1, 2,", [" 3]", " }"]),
    ("from typing import", [" Any", " ==="]),
]
TASK = """
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_a_task_of_ten_lines(server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": text, "choices": choices}) + "\n" for text, choices in LINES))
    (tmp_path / "lines.yaml").write_text(TASK.format(data=data))
    told = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": str(shipped_model_path()),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 2,
            "max_length": 512,
        },
        tasks=["lines"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert told["n-samples"]["lines"]["effective"] == 10
    assert told["results"]["lines"]["acc,none"] >= 0.8  # the model is one of Python
