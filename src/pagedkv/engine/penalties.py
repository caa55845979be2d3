"""What a text has said already, counted as it grows, and the penalties for saying it again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.jit import compiled

__all__ = ["TokenCounts"]

FIRST_CAPACITY = 64

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@compiled
def _penalise(
    logits: Logits,
    ids: Ids,
    counts: npt.NDArray[np.int32],
    repetition: np.float32,
    frequency: np.float32,
    presence: np.float32,
) -> None:
    for place in range(len(ids)):
        token, count = ids[place], counts[place]
        value = logits[token]
        value = value / repetition if value > 0 else value * repetition
        value = value - frequency * np.float32(count)
        if count > 0:
            value = value - presence
        logits[token] = value


class TokenCounts:
    """The tokens of one prompt and text, each with how often the text holds it; as long as there are different ones.

    The repetition penalty is for tokens of the prompt and of the text, presence and frequency penalty for those of the
    text alone: CTRL's (Keskar et al. 2019) and OpenAI's definitions, applied in this order, as vLLM does.

    Parameters
    ----------
    params : SamplingParams
    prompt_token_ids : int64 [n]
    """

    __slots__ = ("_counts", "_factors", "_ids", "_place_of", "_size")

    def __init__(self, params: SamplingParams, prompt_token_ids: npt.ArrayLike) -> None:
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._factors = tuple(np.float32(value) for value in penalties)
        prompt = np.unique(np.asarray(prompt_token_ids, np.int64)) if params.repetition_penalty != 1 else ()
        self._size = len(prompt)
        self._ids: Ids = np.empty(self._size + FIRST_CAPACITY, np.int64)
        self._ids[: self._size] = prompt
        self._counts = np.zeros(len(self._ids), np.int32)
        self._place_of = {int(token): place for place, token in enumerate(prompt)}

    def add(self, token: int) -> None:
        """Count a token of the text."""
        place = self._place_of.get(token)
        if place is None:
            place = self._place_of[token] = self._size
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty(place, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(place, np.int32)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    def apply(self, logits: Logits) -> None:
        """Change the logits of one row, float32 [vocab], in place."""
        _penalise(logits, self._ids[: self._size], self._counts[: self._size], *self._factors)

    def copy(self) -> TokenCounts:
        """Return the same counts for a text that goes its own way from here."""
        other = object.__new__(TokenCounts)
        other._factors, other._size = self._factors, self._size
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        other._place_of = self._place_of.copy()
        return other
