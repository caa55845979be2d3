"""A tokenizer that does what the first word of a text says; it imports nothing heavy, as processes of their own do."""

from __future__ import annotations

import os
import re
import time
from typing import Any


class Stub:
    is_fast = True
    chat_template = None
    all_special_ids: list[int] = []

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        match text.split(" ", 1)[0]:
            case "hang":  # for ever, and no other thread of the process runs
                re.match(r"(a+)+$", "a" * 60 + "b")
            case "sleep":
                time.sleep(600)
            case "die":
                os._exit(3)
            case "fail":
                raise ValueError("no such word")
            case "print":
                print("nothing that anybody reads", flush=True)
        return {"input_ids": [1, os.getpid() % 4096]}

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return f"{len(token_ids)} {os.getpid()}"

    def get_vocab(self) -> dict[str, int]:
        return {"x" * 16: 0}


class Python(Stub):
    is_fast = False


class Unpicklable(Stub):
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class Here(Stub):
    """What only this process can read again."""

    def __reduce__(self) -> Any:
        return _here, (os.getpid(),)


def _here(pid: int) -> Here:
    if os.getpid() != pid:
        raise OSError("not here")
    return Here()
