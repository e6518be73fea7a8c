"""Chat templates: a conversation as text, and which part of that text the assistant wrote.

A conversation is rendered by a jinja template that travels with the checkpoint, in the same sandbox and with the
same helpers transformers uses, so templates of other model families work unchanged. The text inside
`{% generation %} ... {% endgeneration %}` is what the assistant wrote; the loss mask of supervised fine-tuning is
taken from there and nowhere else. For templates without that tag `generation_spans` falls back to comparing
prefixes, which is exact or refused, never a guess.

Text inside a message must not be able to forge control tokens ("<|im_end|>" typed by a user). Before rendering,
control strings inside messages are broken by a guard character; the tokenizer splits the text at the control
strings that are left, which only the template can have written, and then removes the guard.

This module knows strings only, no token ids. Format: ChatML; the generation tag is from transformers'
`apply_chat_template(return_assistant_tokens_mask=True)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nurture.errors import NurtureError, did_you_mean
from nurture.types import Message

ROLES = ("system", "user", "assistant", "tool", "developer", "ipython")

ASSISTANT_MAY_WRITE = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Control strings that stay control tokens inside an assistant's own content."""

CHATML = """\
{#- ChatML: every turn is <|im_start|>role, a newline, the content, <|im_end|> and a newline. Two modes: /think (the
    assistant works in <think> before it answers) and /no_think (an empty <think> is written for it). A system message
    that names a mode wins over the variable enable_thinking; with neither, and without tools, this is plain ChatML. -#}
{%- set state = namespace(mode='', system=custom_instructions or '', last_request=-1, thoughts=false) -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set state.system = messages[0]['content'] -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- set words = state.system.split() -%}
{%- if '/no_think' in words -%}
    {%- set state.mode = '/no_think' -%}
{%- elif '/think' in words -%}
    {%- set state.mode = '/think' -%}
{%- elif enable_thinking is defined and enable_thinking is not none -%}
    {%- set state.mode = '/think' if enable_thinking else '/no_think' -%}
{%- endif -%}
{%- if '/no_think' in words or '/think' in words or '/system_override' in words -%}
    {%- set bare = state.system.replace('/no_think', '').replace('/think', '') -%}
    {%- set state.system = bare.replace('/system_override', '').strip() -%}
{%- endif -%}
{#- The system turn: sections of what there is, or the bare text. -#}
{%- set sections = [] -%}
{%- if '/system_override' not in words -%}
    {%- set facts = [] -%}
    {%- if knowledge_cutoff -%}{%- set facts = facts + ['Knowledge Cutoff Date: ' + knowledge_cutoff] -%}{%- endif -%}
    {%- if today_date -%}{%- set facts = facts + ['Today Date: ' + today_date] -%}{%- endif -%}
    {%- if state.mode -%}{%- set facts = facts + ['Reasoning Mode: ' + state.mode] -%}{%- endif -%}
    {%- if facts -%}{%- set sections = sections + ['## Metadata\\n\\n' + facts | join('\\n')] -%}{%- endif -%}
    {%- set functions = xml_tools or tools or [] -%}
    {%- set told = sections or functions or python_tools -%}
    {%- if told and state.system -%}
        {%- set sections = sections + ['## Custom Instructions\\n\\n' + state.system] -%}
    {%- endif -%}
    {%- if functions or python_tools -%}{%- set sections = sections + ['## Tools'] -%}{%- endif -%}
    {%- if functions -%}
        {%- set listing = namespace(text='') -%}
        {%- for function in functions -%}
            {%- set listing.text = listing.text + (function if function is string else function | tojson) + '\\n' -%}
        {%- endfor -%}
        {%- set sections = sections + ['### XML Tools\\n\\nTo call a function, write {"name": ..., "arguments": {...}} '
            'as JSON between <tool_call> and </tool_call>. The functions:\\n<tools>\\n' + listing.text + '</tools>'] -%}
    {%- endif -%}
    {%- if python_tools -%}
        {%- set sections = sections + ['### Python Tools\\n\\nTo call a function, write Python between <code> and '
            '</code>. The functions:\\n' + python_tools | join('\\n')] -%}
    {%- endif -%}
{%- endif -%}
{%- set system = sections | join('\\n\\n') if sections else state.system -%}
{%- if system or messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}{%- set state.last_request = loop.index0 -%}{%- endif -%}
    {%- set inline = message['role'] == 'assistant' and '</think>' in (message['content'] or '') -%}
    {%- if message['reasoning_content'] or inline -%}
        {%- set state.thoughts = true -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set content = message['content'] or '' -%}
        {%- set thought = message['reasoning_content'] or '' -%}
        {%- if '</think>' in content -%}
            {%- set thought = thought or content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {#- Thoughts about earlier requests are dropped. Without them a turn is not what the assistant wrote, so it
            is context and nothing to train on. -#}
        {%- set current = loop.index0 > state.last_request -%}
        {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if state.mode == '/no_think' else '') -}}
        {%- set reply = namespace(text=content) -%}
        {%- if thought and current and state.mode != '/no_think' -%}
            {%- set reply.text = '<think>\\n' + thought + '\\n</think>\\n' + content -%}
        {%- endif -%}
        {%- for call in message['tool_calls'] or [] -%}
            {%- set function = call['function'] or call -%}
            {%- set arguments = function['arguments'] -%}
            {%- set reply.text = reply.text + ('\\n' if not loop.first or content else '')
                + '<tool_call>\\n{"name": ' + (function['name'] | tojson) + ', "arguments": '
                + (arguments if arguments is string else arguments | tojson) + '}\\n</tool_call>' -%}
        {%- endfor -%}
        {%- if current or state.mode == '/no_think' or not (state.mode or state.thoughts) -%}
            {%- generation -%}{{- reply.text + '<|im_end|>' -}}{%- endgeneration -%}
        {%- else -%}
            {{- reply.text + '<|im_end|>' -}}
        {%- endif -%}
        {{- '\\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if state.mode == '/no_think' else '') -}}
{%- endif -%}
"""

BUILT_IN: dict[str, Literal["", "/think", "/no_think"]] = {
    "chatml": "",
    "chatml_think": "/think",
    "chatml_no_think": "/no_think",
}
"""Names of our template -> the mode that holds where neither the system message nor `enable_thinking` says one."""

_WRITTEN_BY_USERS = ("tools", "xml_tools", "python_tools", "documents", "custom_instructions")
"""Template variables whose text is guarded as messages are."""


def chatml_template(
    start: str = "<|im_start|>",
    end: str = "<|im_end|>",
    default_mode: Literal["", "/think", "/no_think"] = "",
) -> str:
    """Return our template with other turn markers, for tokenizers that have no ChatML tokens.

    Args:
        default_mode: what holds where neither the system message nor `enable_thinking` says; "" for plain ChatML.
    """
    template = CHATML.replace("namespace(mode='',", f"namespace(mode='{default_mode}',")
    return template.replace("<|im_start|>", start).replace("<|im_end|>", end)


def named_template(name: str | None, base: Path) -> str | None:
    """Return the name of a built-in template as it is, else the source of the file, relative to `base`; None of None.

    Raises:
        NurtureError: as of `read_template`.
    """
    return name if name is None or name in BUILT_IN else read_template(base / Path(name).expanduser())


def read_template(file: Path) -> str:
    """Return the source of a jinja template.

    Raises:
        NurtureError: there is no such file, or it is not jinja.
    """
    if not file.is_file():
        known = [*BUILT_IN, *(path.name for path in file.parent.glob("*.jinja"))]
        hint = did_you_mean(file.name, known) or f" Nurture's own are {', '.join(BUILT_IN)}."
        raise NurtureError(f"{file}: there is no such chat template.{hint}")
    try:
        template = file.read_text(encoding="utf-8")
        _compile(template)
    except UnicodeDecodeError as error:
        raise NurtureError(f"{file}: is not text in UTF-8 ({error.reason})") from error
    except jinja2.TemplateSyntaxError as error:
        raise NurtureError(f"{file}:{error.lineno}: {error.message}") from error
    return template


def split_thought(reply: str) -> tuple[str | None, str]:
    """Return the text inside `<think>` (None if there is no thought, or one that never ends) and what follows it."""
    thought, closed, answer = reply.partition("</think>")
    if not closed:
        return None, "" if "<think>" in reply else reply.strip()
    return thought.rpartition("<think>")[2].strip(), answer.strip()


def holds_thought(message: Message) -> bool:
    """Return whether a message carries a thought, in its own field or inside its content."""
    return bool(message.get("reasoning_content")) or "</think>" in (message.get("content") or "")


def unfolded(messages: Sequence[Message], rendered: str) -> list[Sequence[Message]]:
    """Return the conversation, or the parts it must be trained in because its template drops earlier thoughts.

    A part ends before the next request; its last reply is then the newest one, rendered with its thought as it was
    written. A mode without thoughts keeps the conversation whole.

    Args:
        messages: the conversation.
        rendered: the whole of it as the template writes it.
    """
    requests = [place for place, message in enumerate(messages) if message["role"] == "user"]
    earlier = [m for m in messages[: requests[-1]] if m["role"] == "assistant"] if requests else []
    thoughts = [m.get("reasoning_content") or split_thought(m.get("content") or "")[0] for m in earlier]
    shows_thoughts = "<think>" in rendered.replace("<think>\n\n</think>", "")
    if not shows_thoughts or all(thought in rendered for thought in thoughts if thought):
        return [messages]
    ends = [*requests[1:], len(messages)]
    return [messages[:end] for end in ends if messages[end - 1]["role"] == "assistant"]


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        text: the rendered text, still holding `guard` inside control strings that messages contained.
        spans: [start, end) character ranges of `text` that the assistant wrote.
        guard: the character to remove after splitting at control tokens.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    guard: str

    @property
    def plain_text(self) -> str:
        """The text as a reader sees it, without guards."""
        return self.text.replace(self.guard, "")


def validate_messages(messages: Sequence[Mapping[str, Any]], where: str = "conversation") -> None:
    """Check that `messages` is a list of turns with a known role and string content.

    Raises:
        NurtureError: naming the index of the first bad message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise NurtureError(
            f"{where}: messages must be a list of {{role, content}}, got {type(messages).__name__}"
        )
    if not messages:
        raise NurtureError(f"{where}: messages is empty, at least one turn is needed")
    for index, message in enumerate(messages):
        _validate_message(message, f"{where}: messages[{index}]")


def _validate_message(message: Any, place: str) -> None:
    if not isinstance(message, Mapping):
        raise NurtureError(f"{place} must be an object {{role, content}}, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise NurtureError(
            f"{place}.role must be one of {', '.join(ROLES)}, got {role!r}.{did_you_mean(str(role), ROLES)}"
        )
    if message.get("content") is None and message.get("tool_calls"):
        return
    if "content" not in message:
        raise NurtureError(
            f"{place} has no content, only {sorted(map(str, message))}.{did_you_mean('content', map(str, message))}"
        )
    if not isinstance(message["content"], str):
        raise NurtureError(f"{place}.content must be a string, got {type(message['content']).__name__}")
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise NurtureError(f"{place}.reasoning_content must be a string, got {type(reasoning).__name__}")


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    control_strings: Iterable[str] = (),
    variables: Mapping[str, Any] | None = None,
) -> RenderedChat:
    """Render `messages` with a jinja chat template.

    Args:
        template: jinja source.
        add_generation_prompt: end with the header of an assistant turn.
        control_strings: the tokenizer's control tokens; guarded inside message text.
        variables: further template variables (bos_token, tools, enable_thinking, ...).

    Raises:
        NurtureError: a message is malformed, or the template is broken or refuses the conversation.
    """
    validate_messages(messages)
    guard, opening, closing = tuple(_unused_characters(messages, variables))
    forbidden = _alternatives(tuple(control_strings))
    assistant_forbidden = _alternatives(tuple(s for s in control_strings if s not in ASSISTANT_MAY_WRITE))
    guarded = [
        _guard(message, assistant_forbidden if message["role"] == "assistant" else forbidden, guard)
        for message in messages
    ]
    scope = {"tools": None, "documents": None, **(variables or {})}
    scope |= {name: _guard(scope[name], forbidden, guard) for name in _WRITTEN_BY_USERS if name in scope}
    marked = _run_template(template, guarded, add_generation_prompt, opening + closing, scope)
    text, spans = _take_spans(marked, opening, closing)
    return RenderedChat(text, spans, guard)


def has_generation_tag(template: str) -> bool:
    """Return whether the template marks what the assistant wrote."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def generation_spans(
    template: str,
    messages: Sequence[Message],
    end_of_turn: str,
    *,
    control_strings: Iterable[str] = (),
    variables: Mapping[str, Any] | None = None,
) -> RenderedChat:
    """Render `messages` and find the assistant's spans, also for templates without `{% generation %}`.

    Without the tag, the span of assistant turn i is what `messages[:i+1]` adds to `messages[:i]` plus the generation
    prompt, up to and including `end_of_turn`. That is exact whenever both are prefixes of the full text, which is
    checked.

    Raises:
        NurtureError: the template rewrites earlier turns, so that no exact mask can be derived from it.
    """
    control = tuple(control_strings)
    full = render_chat(template, messages, control_strings=control, variables=variables)
    if has_generation_tag(template):
        return full
    remedy = (
        "the chat template has no {% generation %} tag and the assistant's tokens cannot be found exactly without it"
        " ({}). Fine-tune with a template that has {% generation %} ... {% endgeneration %} around the assistant's"
        " content and its end token: sft's setting chat_template=FILE.jinja, or chat_template=chatml for nurture's own."
    )
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise NurtureError(remedy.replace("({})", "(the conversation starts with an assistant turn)"))
        prompt = render_chat(
            template,
            messages[:index],
            add_generation_prompt=True,
            control_strings=control,
            variables=variables,
        ).plain_text
        turn = render_chat(
            template, messages[: index + 1], control_strings=control, variables=variables
        ).plain_text
        end = turn.rfind(end_of_turn) + len(end_of_turn)
        consistent = turn.startswith(prompt) and end > len(prompt) and full.plain_text.startswith(turn[:end])
        if not consistent or end_of_turn not in turn[len(prompt) :]:
            raise NurtureError(
                remedy.replace("({})", f"(it renders messages[{index}] differently in context)")
            )
        spans.append((len(prompt), end))
    return RenderedChat(full.text, tuple(_guarded_spans(full, spans)), full.guard)


def mask_markup(tokenizer: Decoder, token_ids: Sequence[int], completion_mask: Sequence[bool]) -> str:
    """Return tokens as rich markup: trained ones green, the others dim, control tokens reversed."""
    from rich.markup import escape

    parts: list[str] = []
    for trained, group in _runs(completion_mask):
        text = tokenizer.decode([token_ids[position] for position in group])
        parts.append(f"[{'bold green' if trained else 'dim'}]{escape(text)}[/]")
    share = sum(completion_mask) / max(1, len(token_ids))
    summary = f"{sum(completion_mask)} of {len(token_ids)} tokens trained ({share:.0%})"
    return "".join(parts) + f"\n[italic]{summary}[/]"


class Decoder(Protocol):
    """What `mask_markup` needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str: ...


# ---- jinja ----------------------------------------------------------------------------------------------------


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} body {% endgeneration %}`: the body between two marker characters."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        markers = jinja2.nodes.Name("__generation_markers__", "load")
        call = self.call_method("_mark", [markers])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, markers: str, caller: Any) -> str:
        return markers[0] + caller() + markers[1]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _run_template(
    template: str, messages: list[Any], add_generation_prompt: bool, markers: str, scope: Mapping[str, Any]
) -> str:
    try:
        return _compile(template).render(
            **{
                **scope,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
                "__generation_markers__": markers,
            }
        )
    except jinja2.TemplateSyntaxError as error:
        raise NurtureError(f"chat template, line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise NurtureError(f"the chat template does not accept this conversation: {error}") from error


def _take_spans(marked: str, opening: str, closing: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Remove the markers and return where they were. An inner pair of nested tags adds nothing."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = depth = start = 0
    for piece in re.split(f"([{opening}{closing}])", marked):
        if piece == opening:
            start = length if depth == 0 else start
            depth += 1
        elif piece == closing:
            depth -= 1
            if depth == 0:
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), tuple(spans)


# ---- guards ---------------------------------------------------------------------------------------------------


def _unused_characters(messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None) -> str:
    """Return three characters that occur nowhere in the conversation (Unicode noncharacters if possible)."""
    used = json.dumps([list(messages), variables], ensure_ascii=False, default=str)
    candidates = (
        chr(code) for start, end in ((0xFDD0, 0xFDF0), (0xE000, 0xF900)) for code in range(start, end)
    )
    free = "".join(islice((character for character in candidates if character not in used), 3))
    if len(free) < 3:
        raise NurtureError("the conversation uses every private Unicode character; it is not text")
    return free


@lru_cache(maxsize=64)
def _alternatives(strings: tuple[str, ...]) -> re.Pattern[str] | None:
    if not strings:
        return None
    return re.compile("|".join(re.escape(s) for s in sorted(strings, key=len, reverse=True)))


def _guard(value: Any, forbidden: re.Pattern[str] | None, guard: str) -> Any:
    """Return `value` with every control string in it broken after its first character."""
    if forbidden is None:
        return value
    if isinstance(value, str):
        return forbidden.sub(lambda match: match[0][0] + guard + match[0][1:], value)
    if isinstance(value, Mapping):
        return {key: _guard(item, forbidden, guard) for key, item in value.items()}
    if isinstance(value, list):
        return [_guard(item, forbidden, guard) for item in value]
    return value


def _guarded_spans(rendered: RenderedChat, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Move spans of `plain_text` to the coordinates of the guarded `text`."""
    if rendered.guard not in rendered.text:
        yield from spans
        return
    position_of = [i for i, character in enumerate(rendered.text) if character != rendered.guard]
    position_of.append(len(rendered.text))
    for start, end in spans:
        yield position_of[start], position_of[end]


def _runs(flags: Sequence[bool]) -> Iterator[tuple[bool, range]]:
    start = 0
    for position in range(1, len(flags) + 1):
        if position == len(flags) or flags[position] != flags[start]:
            yield flags[start], range(start, position)
            start = position
