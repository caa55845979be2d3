"""SamplingParams: what a caller asks of the text that the engine writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedkv.engine.structured import Structured
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.validate import require_flag, require_int, require_number

GREEDY_BELOW = 1e-5  # temperatures below are greedy: dividing by them says nothing else
MOST_TOKENS = 2**31 - 1
MOST_DRAFTS = 64
MOST_BIAS = 100.0
UNLIKE_BEAMS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "stop": (),
    "logprobs": None,
    "prompt_lookup": 0,
    "streaming": None,
    "structured": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop; checked when it is made, the same names as OpenAI's and vLLM's.

    Parameters
    ----------
    n : int
        Texts for one prompt, each with a random stream of its own.
    max_tokens : int, optional
        Most tokens to generate; None means as many as the model and the cache can hold.
    min_tokens : int
        No end-of-text token, stop token or stop string ends the text before.
    temperature : float
        0 (anything below 1e-5) is greedy: the likeliest token, of equals the one with the lowest id.
    top_k : int
        Sample among the k likeliest tokens; 0 (or -1) means all.
    top_p : float
        Sample in the smallest set of likeliest tokens that holds this probability, 0 < top_p <= 1 (Holtzman et al.
        2019, "The Curious Case of Neural Text Degeneration").
    min_p : float
        Drop tokens that are less likely than this fraction of the likeliest, 0 … 1 (Nguyen et al. 2024, "Turning Up
        the Heat: Min-p Sampling").
    repetition_penalty : float
        Above 1 makes tokens of the prompt and the text less likely: positive logits are divided by it, negative ones
        multiplied (Keskar et al. 2019, "CTRL").
    presence_penalty, frequency_penalty : float
        Taken off the logits of tokens that the text holds, once, and once for each time; -2 … 2, as OpenAI's.
    logit_bias : mapping of int to float, optional
        Added to the logits of token ids, -100 … 100.
    stop : str or sequence of str
        Strings that end the text.
    stop_token_ids : sequence of int
        Tokens that end the text, besides the model's own end-of-text tokens.
    ignore_eos : bool
        Go on after the model's end-of-text tokens.
    include_stop_str_in_output : bool
        Leave what ended the text at its end.
    logprobs : int, optional
        Log probabilities of the chosen token and of this many likeliest, of the raw distribution.
    prompt_logprobs : int, optional
        The same for the tokens of the prompt.
    seed : int, optional
        The same seed gives the same text, whatever else is in the batch. A random one by default.
    beam_width : int, optional
        Beam search with this many beams; the best `n` are returned. Goes with lengths and end tokens, not with
        temperature, penalties, biases, stop strings, logprobs, prompt lookup, streaming or structure.
    length_penalty : float
        Of beam search: scores are divided by length to this power; above 0 favours longer texts.
    prompt_lookup : int
        Propose up to this many tokens a step from an earlier place in the text; the text stays the same.
    streaming : (int, int), optional
        Sink tokens and window tokens: keep only these in the cache, for texts without end.
    skip_special_tokens : bool
        Leave special tokens out of the text.
    structured : Structured, optional
        The JSON Schema, regular expression, choice or grammar that the text follows. It ends where nothing may follow,
        with finish reason ``"stop"``, whatever `min_tokens` and `ignore_eos` say; one that `max_tokens` or a stop
        string cuts is no whole JSON.

    Raises
    ------
    InvalidOperation
        Names the argument, what was expected and what came.
    """

    n: int = 1
    max_tokens: int | None = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    prompt_lookup: int = 0
    streaming: tuple[int, int] | None = None
    skip_special_tokens: bool = True
    structured: Structured | None = None

    def __post_init__(self) -> None:
        self._check_ints()
        self._check_floats()
        self._check_collections()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            require_flag(name, getattr(self, name))
        if self.structured is not None and not isinstance(self.structured, Structured):
            raise bad_argument("structured", "a Structured", f"{self.structured!r:.80}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            hint = "lower it, or raise max_tokens"
            raise bad_argument("min_tokens", f"at most max_tokens = {self.max_tokens}", f"{self.min_tokens}", hint)
        if self.beam_width is not None:
            self._check_beams(self.beam_width)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens that were read or written."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def require_vocab(self, vocab_size: int) -> None:
        """Check the token ids that it names against a model.

        Raises
        ------
        InvalidOperation
            An id is not one of the model's.
        """
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                require_int(name, token, 0, vocab_size - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 0, vocab_size)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_ints(self) -> None:
        bounds = {
            "n": (1, 2**16),
            "max_tokens": (1, MOST_TOKENS),
            "min_tokens": (0, MOST_TOKENS),
            "top_k": (-1, MOST_TOKENS),
            "logprobs": (0, MOST_TOKENS),
            "prompt_logprobs": (0, MOST_TOKENS),
            "seed": (-(2**63), 2**64 - 1),
            "beam_width": (1, 2**10),
            "prompt_lookup": (0, MOST_DRAFTS),
        }
        optional = ("max_tokens", "logprobs", "prompt_logprobs", "seed", "beam_width")
        for name, (low, high) in bounds.items():
            if getattr(self, name) is not None or name not in optional:
                self._set(name, require_int(name, getattr(self, name), low, high))
        self._set("top_k", max(self.top_k, 0))

    def _check_floats(self) -> None:
        largest = float("3e38")
        bounds = {
            "temperature": (0.0, largest),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.0, largest),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
            "length_penalty": (-100.0, 100.0),
        }
        for name, (low, high) in bounds.items():
            self._set(name, require_number(name, getattr(self, name), low, high))
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise bad_argument(name, "a number above 0", f"{getattr(self, name)}")

    def _check_collections(self) -> None:
        self._set("stop", _strings("stop", self.stop))
        ids = _items("stop_token_ids", self.stop_token_ids)
        self._set("stop_token_ids", tuple(require_int("stop_token_ids", i, 0, MOST_TOKENS) for i in ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if self.streaming is not None:
            pair = _items("streaming", self.streaming)
            if len(pair) != 2:
                raise bad_argument("streaming", "(sink_tokens, window_tokens)", f"{self.streaming!r}")
            sinks = require_int("streaming: sink_tokens", pair[0], 0, MOST_TOKENS)
            self._set("streaming", (sinks, require_int("streaming: window_tokens", pair[1], 1, MOST_TOKENS)))

    def _check_beams(self, beam_width: int) -> None:
        if self.n > beam_width:
            raise bad_argument("n", f"at most beam_width = {beam_width}", f"{self.n}", f"search with {self.n} beams")
        for name, default in UNLIKE_BEAMS.items():
            if getattr(self, name) != default:
                reason = f"{name}: does not go with beam_width, got {getattr(self, name)!r}"
                raise InvalidOperation(reason, name, "leave one of the two out")
        if not self.greedy:
            hint = "beam search takes no chances: leave one of the two out"
            raise bad_argument("temperature", "0 with beam_width", f"{self.temperature}", hint)


def _items(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)):
        hint = "a string that ends the text is stop=…" if name == "stop_token_ids" else "write (4, 512)"
        raise bad_argument(name, "a sequence of ints", f"{value!r}", hint)
    try:
        return tuple(value)  # type: ignore[arg-type]
    except TypeError:
        raise bad_argument(name, "a sequence of ints", f"{value!r}", f"write [{value!r}]") from None


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        hint = "token ids that end the text are stop_token_ids=…"
        raise bad_argument(name, "a string or strings, none of them empty", f"{value!r}", hint)
    return tuple(dict.fromkeys(strings))


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        hint = "write {token_id: bias}"
        raise bad_argument("logit_bias", "a mapping of token ids to numbers", f"{value!r}", hint)
    return {
        require_int("logit_bias", token, 0, MOST_TOKENS): require_number(
            f"logit_bias of token {token}", bias, -MOST_BIAS, MOST_BIAS
        )
        for token, bias in value.items()
    }
