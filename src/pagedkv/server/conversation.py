"""From the messages of a chat to the text that the model goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagedkv.server.errors import ApiError
from pagedkv.server.model import ServedModel
from pagedkv.server.schemas_chat import ChatMessage

__all__ = ["PLAIN_STOPS", "encode_chat", "has_template", "plain_chat"]

PLAIN_STOPS = ("\nuser:", "\nsystem:")
"""Where an answer ends in the plain form: the model begins to speak for somebody else."""


def has_template(model: ServedModel) -> bool:
    """Whether the model, or its operator, says how a chat is written."""
    return bool(model.chat_template or getattr(model.tokenizer, "chat_template", None))


def plain_chat(messages: Sequence[ChatMessage], *, open_answer: bool = True) -> str:
    """Return a chat in the plain form, for models without a template: ``role: text`` and an empty line, each."""
    said = [f"{_role(message)}: {message.text}\n\n" for message in messages]
    return "".join(said) + ("assistant:" if open_answer else "")


async def encode_chat(model: ServedModel, messages: Sequence[ChatMessage], *, open_answer: bool = True) -> list[int]:
    """Return the tokens of a chat.

    Raises
    ------
    ApiError
        400: a message is empty, or the template does not take them.
    """
    for place, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            field = f"messages.{place}.content"
            text = f"{field}: expected a text or parts of type text, got none"
            raise ApiError(400, text, param=field, code="invalid_value")
    if not has_template(model):
        return await model.encode(plain_chat(messages, open_answer=open_answer))

    def render(tokenizer: Any) -> str:
        said = [{"role": _role(message), "content": message.text} for message in messages]
        text: str = tokenizer.apply_chat_template(
            said, chat_template=model.chat_template, tokenize=False, add_generation_prompt=open_answer
        )
        return text

    try:
        text = await model.render_chat(render)
    except ApiError:
        raise
    except Exception as error:
        # Templates refuse by raising, an unusual order of roles for instance. What they say may quote the messages,
        # which is fine towards the client who sent them.
        raise ApiError(
            400, f"messages: the chat template refuses them: {error}", param="messages", code="chat_template"
        ) from error
    return await model.encode(text, special_tokens=False)


def _role(message: ChatMessage) -> str:
    # The newer name of the system's role, which templates do not know.
    return "system" if message.role == "developer" else message.role
