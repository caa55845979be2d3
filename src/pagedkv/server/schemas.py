"""Request bodies of the API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from pagedkv.engine import SamplingParams
from pagedkv.errors import bad_argument
from pagedkv.server.errors import ApiError
from pagedkv.server.tool_values import FUNCTION_NAME

MOST_TEXTS = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_TOOLS = 512
INT64 = 2**63


# With a constraint of any kind halves of surrogate pairs, which no tokenizer takes, are refused.
Text = Annotated[str, StringConstraints(min_length=0)]


class Body(BaseModel):
    """A JSON object of a client: wrong types are refused, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


# Fields of other servers. One that would change the answer is refused unless its value is one that changes nothing;
# null always is. What is neither here nor a field of the request cannot change the answer, and is ignored.

_NEVER: tuple[Any, ...] = ()
_OFF, _ON, _ZERO, _ONE = (False,), (True,), (0,), (1,)
_EMPTY: tuple[Any, ...] = ("", [], {})

NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": _NEVER,
    "function_call": ("none", "auto"),
    "functions": _EMPTY,
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "suffix": _EMPTY,
    "tool_choice": ("none", "auto"),
    "tools": _EMPTY,
    "verbosity": ("medium",),
    "web_search_options": _NEVER,
    # vLLM
    "allowed_token_ids": _NEVER,
    "bad_words": _EMPTY,
    "best_of": _ONE,
    "chat_template": _NEVER,
    "continue_final_message": _OFF,
    "documents": _EMPTY,
    "echo": _OFF,
    "include_reasoning": _ON,
    "kv_transfer_params": _EMPTY,
    "length_penalty": _ONE,
    "logits_processors": _EMPTY,
    "logprob_token_ids": _EMPTY,
    "media_io_kwargs": _EMPTY,
    "mm_processor_kwargs": _EMPTY,
    "prompt_embeds": _EMPTY,
    "repetition_detection": _NEVER,
    "return_tokens_as_token_ids": _OFF,
    "spaces_between_special_tokens": _ON,
    "structural_tag": _NEVER,
    "thinking_token_budget": _NEVER,
    "truncate_prompt_tokens": _NEVER,
    "use_beam_search": _OFF,
    "vllm_xargs": _EMPTY,
    # llama.cpp
    "dry_multiplier": _ZERO,
    "dynatemp_range": _ZERO,
    "image_data": _EMPTY,
    "input_prefix": _EMPTY,
    "input_suffix": _EMPTY,
    "lora": _EMPTY,
    "min_keep": _ZERO,
    "mirostat": _ZERO,
    "n_indent": _ZERO,
    "n_probs": _ZERO,
    "parse_special": _ON,
    "penalize_nl": _ON,
    "repeat_last_n": (-1,),
    "response_fields": _NEVER,
    "return_tokens": _OFF,
    "samplers": _NEVER,
    "t_max_predict_ms": (0, -1),
    "tfs_z": _ONE,
    "top_n_sigma": (-1,),
    "typical_p": _ONE,
    "with_pieces": _OFF,
    "xtc_probability": _ZERO,
    # SGLang
    "custom_logit_processor": _NEVER,
    "lora_path": _NEVER,
    "no_stop_trim": _OFF,
    "return_hidden_states": _OFF,
    "session_params": _EMPTY,
    "stop_regex": _EMPTY,
    # of a message
    "reasoning_content": _EMPTY,
    "refusal": _EMPTY,
    "tool_calls": _EMPTY,
}
"""Names to the values that change nothing."""

OTHER_NAMES = {
    "add_special": "add_special_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
"""llama.cpp's names to ours."""


class RequestBody(Body):
    """A body that asks for something: fields that would change the answer and are not honoured are refused."""

    not_honoured: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Names that only this body has, to the values that change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _foreign_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        refused = {**NOT_HONOURED, **cls.not_honoured}
        for name in sorted(given.keys() & (refused.keys() - cls.model_fields.keys())):
            if given[name] is not None and given[name] not in refused[name]:
                message = f"{name}: not supported by this server, and with it the answer would be another one"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        for other in sorted(given.keys() & OTHER_NAMES.keys()):
            name = OTHER_NAMES[other]
            if name not in cls.model_fields or given[other] is None:
                continue
            if given.get(name) not in (None, given[other]):
                message = f"{other}: expected what {name} says, of which it is another name, got something else"
                raise ApiError(400, message, param=other, code="invalid_value")
            given = {**given, name: given[other]}
        return given


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(None, description="End with a chunk that holds the usage.")


Schema = dict[str, Any] | str


class JsonSchemaFormat(Body):
    """A JSON Schema that an answer follows."""

    name: str | None = None
    description: str | None = None
    json_schema: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Accepted: the schema is always followed to the letter.")


class ResponseFormat(Body):
    """What an answer is."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaFormat | None = None
    of_object: Schema | None = Field(None, alias="schema", description="llama.cpp has the schema here.")


class StructuredOutputs(Body):
    """What an answer follows, as vLLM has it: one of json, json_object, regex, choice and grammar."""

    of_json: Schema | None = Field(None, alias="json", description="A JSON Schema.")
    json_object: bool | None = Field(None, description="Any object.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="In Lark or GBNF.")
    disable_any_whitespace: bool | None = Field(None, description="JSON without spaces and line breaks.")
    whitespace_pattern: str | None = Field(None, description="Between the tokens of JSON.")
    disable_additional_properties: Literal[False] | None = Field(None, description="Say so in the schema instead.")
    structural_tag: None = Field(None, description="Not supported.")


StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class GenerationFields(RequestBody):
    """How to write, and for whom; ``null`` means the default everywhere."""

    model: str | None = Field(None, description="The name of the model; the one that is served by default.")
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = Field(None, description="Texts for each prompt; 1.")
    stream: bool | None = Field(None, description="Send server-sent events.")
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0 is greedy; 1 by default.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = Field(
        None, description="The same seed gives the same text, whatever else is computed beside it."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = Field(
        None, description="Token ids (as strings) to what is added to their logits."
    )
    user: str | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="Extension; 0 or -1 means all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Extension.")
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description="Extension.")
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="Extension.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = Field(
        None, description="Extension."
    )
    ignore_eos: bool | None = Field(None, description="Extension: go on after the end of the text.")
    skip_special_tokens: bool | None = Field(None, description="Extension; true.")
    include_stop_str_in_output: bool | None = Field(None, description="Extension.")
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        None, description="Extension: requests of different salts share no prefixes."
    )
    priority: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="Extension: higher goes first; 0 by default."
    )
    session_id: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        None, description="Extension: what belongs together; the header x-session-id says it, too."
    )
    cache_prompt: bool | None = Field(None, description="Extension: false reads no prefix from the cache; true.")
    add_special_tokens: bool | None = Field(
        None,
        description="Extension: with the tokens that open a text; true, but false where a chat template writes them.",
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(
        None, description="Extension: how likely the tokens of the prompt are, with so many likeliest ones; no streams."
    )
    return_token_ids: bool | None = Field(None, description="Extension: the ids of the prompt and of the text, too.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Extension: of longer prompts only so many last tokens; -1 means what fits."
    )
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored: prefixes are found by themselves.")
    response_format: ResponseFormat | None = Field(None, description="A text, any JSON object, or by a schema.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's: what the answer follows.")
    guided_json: Schema | None = Field(None, description="vLLM's older name.")
    guided_regex: str | None = Field(None, description="vLLM's older name.")
    guided_choice: list[str] | None = Field(None, description="vLLM's older name.")
    guided_grammar: str | None = Field(None, description="vLLM's older name.")
    guided_whitespace_pattern: str | None = Field(None, description="vLLM's older name.")
    json_schema: Schema | None = Field(None, description="llama.cpp's and SGLang's name.")
    grammar: str | None = Field(None, description="llama.cpp's name.")
    ebnf: str | None = Field(None, description="SGLang's name.")
    regex: str | None = Field(None, description="SGLang's name.")

    @property
    def texts(self) -> int:
        """How many texts are returned for a prompt."""
        return self.n or 1

    def check_prompt_logprobs(self) -> None:
        """See that they are not asked for in a stream; InvalidOperation if they are."""
        if self.stream and self.prompt_logprobs is not None:
            raise bad_argument("prompt_logprobs", "none in a stream", f"{self.prompt_logprobs}")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self, **more: Any) -> SamplingParams:
        """Return what the engine is asked; `more` wins.

        Raises
        ------
        InvalidOperation
            Fields that do not go together.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAME if getattr(self, name) is not None}
        given.setdefault("temperature", 1.0)
        if self.logit_bias:
            given["logit_bias"] = _token_biases(self.logit_bias)
        return SamplingParams(**{**given, **more})


_SAME = sorted(GenerationFields.model_fields.keys() & {each.name for each in fields(SamplingParams)} - {"logit_bias"})
"""Fields that mean the same to the engine."""


def _token_biases(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise bad_argument("logit_bias", "token ids as keys", f"{name[:40]!r}")
        biases[int(name)] = bias
    return biases


# Of ``/v1/chat/completions``.


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


FunctionName = Annotated[str, StringConstraints(pattern=f"^{FUNCTION_NAME}$")]


class FunctionCall(Body):
    """A function and what it is called with."""

    name: Text
    arguments: Text = Field(description="The JSON of an object.")


class ToolCall(Body):
    """A call of a tool by the model."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestBody):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1000, fail_fast=True)] | None = Field(
        None, description="A text, or parts of type text; only an assistant may have said nothing."
    )
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Body):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="The JSON schema of an object; none by default.")
    strict: bool | None = Field(None, description="Arguments are held to the schema where calls are required.")


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionRef(Body):
    """The name of a function."""

    name: FunctionName


class ToolRef(Body):
    """The name of a tool."""

    type: Literal["function"]
    function: FunctionRef


class AllowedTools(Body):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolRef], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


class AllowedToolsChoice(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | ToolRef | AllowedToolsChoice


class ChatRequest(GenerationFields):
    """Answer a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(None, description="auto by default: the model decides.")
    parallel_tool_calls: bool | None = Field(None, description="Whether an answer may hold several calls; true.")
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="As many as fit by default.")
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="The newer name of max_tokens; it wins."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = Field(None, description="Extension: open the answer; true.")
    continue_final_message: bool | None = Field(
        None,
        description="Extension: go on with the last message, whoever said it; add_generation_prompt is false then.",
    )
    chat_template: Text | None = Field(
        None, description="Extension: a Jinja template, where the server lets clients bring one."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension: what the chat template is told.")

    @property
    def limit(self) -> int | None:
        """The most tokens to write."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(RequestBody):
    """A text, or a conversation."""

    model: str | None = None
    prompt: Text | None = Field(None, description="A text; either it or messages.")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)] | None = Field(
        None, description="A conversation, written out as for the chat endpoint."
    )
    add_special_tokens: bool | None = Field(
        None, description="With the tokens that open a text; true, but false where a chat template writes them."
    )
    add_generation_prompt: bool | None = Field(None, description="Of a conversation: open the answer; true.")
    continue_final_message: bool | None = Field(None, description="Of a conversation: go on with its last message.")
    chat_template: Text | None = Field(None, description="A Jinja template, where the server lets clients bring one.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="What the chat template is told.")
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    return_token_strs: bool | None = Field(None, description="Return the text of every token, too.")


class DetokenizeRequest(RequestBody):
    """Tokens."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


# Of ``/v1/completions``.

NonEmptyText = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = (
    NonEmptyText
    | Tokens
    | Annotated[list[NonEmptyText], Field(min_length=1, fail_fast=True)]
    | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
)


class CompletionRequest(GenerationFields):
    """Go on from prompts."""

    prompt: Prompt = Field(description="A text, texts, token ids, or lists of token ids.")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="16 by default.")
    echo: bool | None = Field(None, description="Return the prompt before the text.")
    suffix: Text | None = Field(
        None, description="What follows the text, for models that were taught to fill in what is missing between."
    )
    best_of: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = Field(
        None, description="Write so many texts and return the n likeliest by token; not in streams."
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
