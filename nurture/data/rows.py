"""One row type for every data format found in the wild.

Every source ends in `Row`s; every stage starts from them. Pretraining reads `text`, supervised fine-tuning
`messages`, preference stages `prompt`, `responses` and `ranking`, reinforcement learning `prompt` with `answer` or
`tests`. A record (a JSON object or a parquet row) is recognised by its keys, so no conversion scripts are needed; a
record that is not recognised, or that lacks what its format needs, is refused by name, with its file and line.

Not here: reading files (sources.py) and turning text into tokens (shards.py, packing.py).
Formats: FACTS section 8; TRL's docs/source/dataset_formats.md; hh-rlhf, GSM8K, MBPP, HumanEval and OASST as published.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nurture.chat_template import validate_messages
from nurture.errors import NurtureError, did_you_mean
from nurture.types import Message

Turns = tuple[Message, ...]

_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One training or evaluation item. What a format does not have is None or empty.

    Attributes:
        text: the row as running text; what pretraining reads.
        messages: a whole conversation worth imitating; what supervised fine-tuning reads.
        prompt: the turns before the reply.
        responses: candidate replies, each the turns that follow the prompt (nearly always one).
        ranking: indices into `responses`, best first; equally good ones share a group.
        answer: the short answer a reply is checked against.
        tests: source code that checks a program.
        entry_point: name of the function the tests call.
        template_kwargs: variables for the chat template (enable_thinking, tools, ...).
        metadata: what else the record said and a stage may want.
    """

    text: str | None = None
    messages: Turns | None = None
    prompt: Turns | None = None
    responses: tuple[Turns, ...] = ()
    ranking: tuple[tuple[int, ...], ...] = ()
    answer: str | None = None
    tests: tuple[str, ...] = ()
    entry_point: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield (better, worse) indices into `responses` for every pair the ranking orders."""
        for place, group in enumerate(self.ranking):
            for better in group:
                for worse_group in self.ranking[place + 1 :]:
                    yield from ((better, worse) for worse in worse_group)

    def ties(self) -> Iterator[tuple[int, int]]:
        """Yield index pairs of responses that are equally good."""
        for group in self.ranking:
            for position, first in enumerate(group):
                yield from ((first, second) for second in group[position + 1 :])

    def identity(self) -> str:
        """Return the content that decides between training and held-out: the question, or else the text.

        Two rows that ask the same thing are on the same side, whatever their answers.
        """
        turns = _until_reply(self.prompt or self.messages or ())
        if turns:
            return "\n".join(turn.get("content") or "" for turn in turns).strip()
        return (self.text or "").strip()

    def is_heldout(self, one_in: int) -> bool:
        """Return whether the row is in the held-out part: by sha256 of its content, one row in `one_in`."""
        if one_in <= 0:
            return False
        digest = hashlib.sha256(self.identity().encode("utf-8", "replace")).digest()
        return int.from_bytes(digest[:8], "big") % one_in == 0


def parse_row(record: Mapping[str, Any], where: str) -> Row:
    """Return the record as a `Row`; the first one where a record holds several.

    Args:
        record: a JSON object or parquet row.
        where: "file:line", for messages.

    Raises:
        NurtureError: the format is not recognised, or something it needs is missing or of the wrong type.
    """
    return next(iter(parse_rows(record, where)))


def parse_rows(record: Mapping[str, Any], where: str) -> list[Row]:
    """Return all rows of a record: one, except for message trees and self-instruct tasks with several instances."""
    if not isinstance(record, Mapping):
        raise NurtureError(f"{where}: a row must be a JSON object, got {type(record).__name__}")
    reader = _Reader(record, where)
    for keys, parse in _FORMATS:
        if reader.has(*keys):
            rows = parse(reader)
            if not rows:
                raise NurtureError(
                    f"{where}: the row holds nothing to use (keys {', '.join(map(str, record))})"
                )
            return rows
    raise NurtureError(_unrecognised(record, where))


def parse_ranking(ranking: Any, count: int, where: str) -> tuple[tuple[int, ...], ...]:
    """Return groups of response indices, best first, from "D > C > A = B" or from a list of ranks (1 is best).

    Raises:
        NurtureError: a response is missing, unknown, or named twice.
    """
    if isinstance(ranking, str):
        groups = [[_letter(name, count, where) for name in part.split("=")] for part in ranking.split(">")]
    elif isinstance(ranking, Sequence) and all(isinstance(rank, (int, float)) for rank in ranking):
        if len(ranking) != count:
            raise NurtureError(f"{where}: 'ranking' has {len(ranking)} ranks for {count} responses")
        groups = [[i for i, rank in enumerate(ranking) if rank == value] for value in sorted(set(ranking))]
    else:
        raise NurtureError(
            f"{where}: 'ranking' must look like \"B > A = C\" or be a list of ranks, got {ranking!r}"
        )
    named = [index for group in groups for index in group]
    if sorted(named) != list(range(count)):
        raise NurtureError(
            f"{where}: 'ranking' {ranking!r} must name each of the {count} responses (A to {_name(count - 1)}) once"
        )
    return tuple(tuple(group) for group in groups)


def conversations(rows: Iterable[Row], where: str = "the data") -> Iterator[tuple[Turns, Mapping[str, Any]]]:
    """Yield (messages, template variables) of the rows that hold a conversation to imitate.

    Raises:
        NurtureError: at the end, if no row did.
    """
    found = seen = 0
    for row in rows:
        seen += 1
        if row.messages is not None:
            found += 1
            yield row.messages, row.template_kwargs
    if not found:
        held = f"{seen} rows, but none with" if seen else "no rows, so none with"
        raise NurtureError(
            f"{where}: {held} a conversation; fine-tuning needs messages, prompt/completion, instruction/output or"
            " question/answer rows"
        )


# ---- reading one record -----------------------------------------------------------------------------------------


class _Reader:
    """A record together with where it is from; every getter names the key that is wrong."""

    def __init__(self, record: Mapping[str, Any], where: str) -> None:
        self.record = record
        self.where = where

    def has(self, *keys: str) -> bool:
        return all(any(self.record.get(name) is not None for name in key.split("|")) for key in keys)

    def get(self, *names: str) -> Any:
        return next((self.record[name] for name in names if self.record.get(name) is not None), None)

    def fail(self, key: str, expected: str, value: Any) -> NurtureError:
        found = "nothing" if value is None else f"{type(value).__name__} {_short(value)}"
        hint = did_you_mean(key, (str(k) for k in self.record if k != key)) if value is None else ""
        return NurtureError(f"{self.where}: key '{key}' must be {expected}, got {found}.{hint}")

    def string(self, *names: str) -> str:
        """Return the first of the named keys as a string; numbers and truth values are written out."""
        value = self.get(*names)
        if isinstance(value, (int, float)):
            return _written_out(value)
        if not isinstance(value, str):
            raise self.fail(self._present(names), "a string", value)
        return _clean(value)

    def optional_string(self, *names: str) -> str:
        return self.string(*names) if self.get(*names) is not None else ""

    def number(self, *names: str) -> float:
        """Return the first of the named keys as a finite number."""
        value = self.get(*names)
        if not _is_number(value):
            raise self.fail(self._present(names), "a number", value)
        return float(value)

    def numbers(self, *names: str, count: int) -> list[float]:
        """Return the first of the named keys as a list of `count` finite numbers; none of them: an empty list."""
        value = self.get(*names)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)) or len(value) != count or not all(map(_is_number, value)):
            raise self.fail(self._present(names), f"a list of {count} numbers, one a response", value)
        return [float(item) for item in value]

    def strings(self, name: str) -> list[str]:
        value = self.record.get(name)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise self.fail(name, "a list of strings", value)
        return [_clean(item) for item in value]

    def turns(self, name: str, role: str) -> list[Message]:
        """Return a key that holds a message list, or a string that is one message of `role`."""
        value = self.record.get(name)
        if isinstance(value, str):
            return [{"role": role, "content": _clean(value)}]
        if isinstance(value, (int, float)):
            return [{"role": role, "content": _written_out(value)}]
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise self.fail(name, "a string or a list of messages", value)
        return [self._message(item, f"{name}[{index}]") for index, item in enumerate(value)]

    def _message(self, item: Any, place: str) -> Message:
        if not isinstance(item, Mapping):
            raise NurtureError(
                f"{self.where}: {place} must be a message {{role, content}}, got {_short(item)}"
            )
        role = item.get("role", item.get("from"))
        message: Message = {"role": _ROLES.get(role, role) if isinstance(role, str) else role}  # type: ignore[typeddict-item]
        content = item.get("content", item.get("value"))
        if isinstance(content, (list, tuple)):
            content = self._joined_parts(content, place)
        if content is None and "content" not in item and "value" not in item and not item.get("tool_calls"):
            known = ("role", "content", "from", "value")
            near = next((did_you_mean(str(k), known) for k in item if k not in known), "")
            raise NurtureError(
                f"{self.where}: {place} has no 'content', only {sorted(map(str, item))}.{near}"
            )
        message["content"] = (
            _clean(content) if isinstance(content, str) else "" if content is None else content
        )
        reasoning = item.get("reasoning_content") or item.get("reasoning") or item.get("thinking")
        if isinstance(reasoning, str):
            message["reasoning_content"] = _clean(reasoning)
        if item.get("tool_calls"):
            message["tool_calls"] = list(item["tool_calls"])
        if message["role"] == "tool":  # some templates say which call is answered, and by what
            if isinstance(item.get("tool_call_id"), str):
                message["tool_call_id"] = item["tool_call_id"]
            if isinstance(item.get("name"), str):
                message["name"] = item["name"]
        return message

    def _joined_parts(self, parts: Sequence[Any], place: str) -> str:
        """OpenAI's content parts: [{"type": "text", "text": ...}]."""
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) < len(texts):
            raise NurtureError(
                f"{self.where}: {place}.content holds parts that are not text; only text is supported"
            )
        return "".join(strings)

    def checked(self, turns: Sequence[Message], name: str) -> Turns:
        validate_messages(turns, f"{self.where}: key '{name}'")
        return tuple(turns)

    def with_system(self, turns: list[Message]) -> list[Message]:
        system = self.optional_string("system", "system_prompt")
        if system and turns and turns[0]["role"] != "system":
            return [{"role": "system", "content": system}, *turns]
        return turns

    def template_kwargs(self) -> dict[str, Any]:
        kwargs = self.record.get("chat_template_kwargs")
        result = {k: v for k, v in kwargs.items() if v is not None} if isinstance(kwargs, Mapping) else {}
        tools = self.record.get("tools")
        if isinstance(tools, str) and tools.strip().startswith("["):
            tools = json.loads(tools)
        return {**result, "tools": tools} if tools else result

    def metadata(self, *used: str) -> dict[str, Any]:
        """What is left of the record, small values only."""
        return {
            str(key): value
            for key, value in self.record.items()
            if key not in used and isinstance(value, (str, int, float, bool)) and len(str(value)) <= 200
        }

    def _present(self, names: Sequence[str]) -> str:
        return next((name for name in names if self.record.get(name) is not None), names[0])


# ---- the formats ------------------------------------------------------------------------------------------------


def _preference(reader: _Reader) -> list[Row]:
    chosen, rejected = reader.record["chosen"], reader.record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and chosen.lstrip().startswith("Human:"):
        both = _transcript(reader, "chosen"), _transcript(reader, "rejected")
        prompt, replies = _split_common(reader, *both)
    else:
        replies = [reader.turns("chosen", "assistant"), reader.turns("rejected", "assistant")]
        if reader.has("prompt|question|instruction|input"):
            prompt = reader.with_system(_prompt(reader))
            if all(
                _repeats(reply, prompt) for reply in replies
            ):  # with what was said before it, a system message say
                prompt, replies = _split_common(reader, *map(reader.with_system, replies))
            replies = [_without_prompt(reply, prompt) for reply in replies]
        else:
            prompt, replies = _split_common(reader, *replies)
    ranking = ((0, 1),) if reader.record.get("tie") is True else ((0,), (1,))
    ratings: list[float] = []
    if reader.has("margin"):
        ratings = [reader.number("margin"), 0.0]
    elif reader.has("chosen_score|score_chosen", "rejected_score|score_rejected"):
        ratings = [reader.number(f"{side}_score", f"score_{side}") for side in ("chosen", "rejected")]
    return [_ranked(reader, prompt, replies, ranking, ratings)]


def _prompt(reader: _Reader) -> list[Message]:
    if reader.get("prompt") is not None:
        return reader.turns("prompt", "user")
    if reader.get("instruction") is not None:
        return [{"role": "user", "content": _instruction(reader)}]
    return [{"role": "user", "content": reader.string("question", "input")}]


def _ranked(
    reader: _Reader,
    prompt: list[Message],
    replies: list[list[Message]],
    ranking: tuple[tuple[int, ...], ...],
    ratings: Sequence[float] = (),
) -> Row:
    """A preference row; two responses that are word for word the same are tied."""
    checked = [reader.checked(reply, f"response {_name(i)}") for i, reply in enumerate(replies)]
    if len(checked) == 2 and checked[0] == checked[1]:
        ranking = ((0, 1),)
    best = [*prompt, *checked[ranking[0][0]]]
    return Row(
        text=_as_text(best),
        prompt=reader.checked(prompt, "prompt"),
        responses=tuple(checked),
        ranking=ranking,
        messages=tuple(best),
        template_kwargs=reader.template_kwargs(),
        metadata={
            **reader.metadata("prompt", "chosen", "rejected", "ranking"),
            **({"ratings": tuple(ratings)} if ratings else {}),
        },
    )


def _transcript(reader: _Reader, name: str) -> list[Message]:
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." form."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):[ \n]?", "\n\n" + reader.string(name).lstrip())
    turns: list[Message] = [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if not turns or turns[-1]["role"] != "assistant":
        raise NurtureError(f"{reader.where}: key '{name}' must end with an Assistant turn")
    return turns


def _split_common(
    reader: _Reader, first: list[Message], second: list[Message]
) -> tuple[list[Message], list[list[Message]]]:
    """Split two conversations into the prompt they share and what follows it."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    while shared and first[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise NurtureError(
            f"{reader.where}: 'chosen' and 'rejected' share no prompt; add a 'prompt' key or make both start with"
            " the same turns"
        )
    return first[:shared], [first[shared:], second[shared:]]


def _repeats(reply: list[Message], prompt: list[Message]) -> bool:
    """Return whether a whole conversation was given as a reply, one that says more than the prompt before it."""
    asked = [turn for turn in prompt if turn["role"] != "system"]
    places = [place for place, turn in enumerate(reply[:-1]) if asked and turn == asked[-1]]
    return reply[0]["role"] != "assistant" and bool(places) and places[-1] + 1 > len(prompt)


def _without_prompt(reply: list[Message], prompt: list[Message]) -> list[Message]:
    """UltraFeedback and Tulu repeat the prompt in chosen and rejected."""
    for start in range(len(prompt)):
        tail = prompt[start:]
        if len(reply) > len(tail) and reply[: len(tail)] == tail:
            return reply[len(tail) :]
    return reply


def _ranking(reader: _Reader) -> list[Row]:
    responses = reader.record["responses"]
    if not isinstance(responses, (list, tuple)) or len(responses) < 2:
        raise reader.fail("responses", "a list of at least two replies", responses)
    replies = [
        _Reader({"responses": reply}, reader.where).turns("responses", "assistant") for reply in responses
    ]
    ratings = reader.numbers("ratings", "scores", count=len(replies))
    given = reader.get("ranking", "ranks")
    ranking = parse_ranking([-r for r in ratings] if given is None else given, len(replies), reader.where)
    return [_ranked(reader, reader.with_system(_prompt(reader)), replies, ranking, ratings)]


def _two_responses(reader: _Reader) -> list[Row]:
    """PandaLM (three annotators: 0 tie, 1 or 2 better) and LLMBar (label 1 or 2)."""
    names = ("response1", "response2") if reader.has("response1") else ("output_1", "output_2")
    votes = [reader.record[key] for key in reader.record if str(key).startswith("annotator")]
    votes = votes or [reader.get("label")]
    if not all(vote in (0, 1, 2) for vote in votes):
        raise NurtureError(f"{reader.where}: annotators must be 0 (tie), 1 or 2, got {votes}")
    most = max(map(votes.count, votes))
    winners = {vote for vote in votes if votes.count(vote) == most}
    winner = winners.pop() if len(winners) == 1 else 0
    ranking = {0: ((0, 1),), 1: ((0,), (1,)), 2: ((1,), (0,))}[winner]
    return [_ranked(reader, _prompt(reader), [reader.turns(name, "assistant") for name in names], ranking)]


def _conversation(reader: _Reader) -> list[Row]:
    name = next(n for n in ("messages", "conversations", "conversation") if reader.get(n) is not None)
    if not isinstance(reader.record[name], (list, tuple)):
        raise reader.fail(name, "a list of messages", reader.record[name])
    turns = reader.checked(reader.with_system(reader.turns(name, "user")), name)
    text = reader.get("text")
    replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    last = replies[-1] if replies else len(turns)
    return [
        Row(
            text=_clean(text) if isinstance(text, str) else _as_text(turns),
            messages=turns if replies else None,
            prompt=turns[:last] or None,
            answer=reader.optional_string("answer", "ground_truth") or None,
            template_kwargs=reader.template_kwargs(),
            metadata=reader.metadata(name, "text"),
        )
    ]


def _message_tree(reader: _Reader) -> list[Row]:
    """OASST: one conversation (the best reply at every turn) and a ranking wherever replies were ranked."""
    rows: list[Row] = []
    best: list[Message] = []

    def visit(node: Mapping[str, Any], path: list[Message], on_best: bool) -> None:
        role = "user" if node.get("role", "prompter") == "prompter" else "assistant"
        text = node.get("text")
        if not isinstance(text, str):
            raise NurtureError(f"{reader.where}: a message of the tree has no 'text'")
        path = [*path, {"role": role, "content": _clean(text)}]
        if on_best:
            best[:] = path
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        replies.sort(key=lambda reply: reply["rank"] if reply.get("rank") is not None else len(replies))
        ranked = [
            reply for reply in replies if reply.get("rank") is not None and reply["role"] == "assistant"
        ]
        if len(ranked) >= 2:
            answers: list[list[Message]] = [
                [{"role": "assistant", "content": _clean(r["text"])}] for r in ranked
            ]
            order = parse_ranking([r["rank"] for r in ranked], len(ranked), reader.where)
            rows.append(Row(prompt=tuple(path), responses=tuple(map(tuple, answers)), ranking=order))
        for index, reply in enumerate(replies):
            visit(reply, path, on_best and index == 0)

    visit(reader.record["prompt"], [], True)
    while best and best[-1]["role"] != "assistant":
        best.pop()
    if best:
        turns = reader.checked(best, "prompt")
        rows.insert(0, Row(text=_as_text(turns), messages=turns, prompt=turns[:-1]))
    return rows


def _self_instruct(reader: _Reader) -> list[Row]:
    instances = reader.record["instances"]
    if not isinstance(instances, (list, tuple)):
        raise reader.fail("instances", "a list of {input, output}", instances)
    rows = []
    for index, instance in enumerate(instances):
        inner = _Reader(
            {"instruction": reader.record["instruction"], **instance}, f"{reader.where}: instances[{index}]"
        )
        rows += _instruction_output(inner)
    return rows


def _instruction(reader: _Reader) -> str:
    extra = reader.optional_string("input", "context")
    return reader.string("instruction") + (f"\n\n{extra}" if extra.strip() else "")


def _instruction_output(reader: _Reader) -> list[Row]:
    prompt: list[Message] = [{"role": "user", "content": _instruction(reader)}]
    reply = reader.string("output", "response", "completion")
    return [
        _answered(reader, reader.with_system(prompt), reply, metadata=reader.metadata("instruction", "input"))
    ]


def _prompt_completion(reader: _Reader) -> list[Row]:
    prompt = reader.with_system(reader.turns("prompt", "user"))
    name = "completion" if reader.has("completion") else "response"
    turns = reader.checked([*prompt, *reader.turns(name, "assistant")], name)
    wanted = (
        reader.record.get("label") is not False
    )  # unpaired preference rows: a bad example is not imitated
    return [
        Row(
            text=_as_text(turns),
            messages=turns if wanted else None,
            prompt=turns[: len(prompt)],
            responses=(turns[len(prompt) :],),
            answer=reader.optional_string("answer", "ground_truth") or None,
            template_kwargs=reader.template_kwargs(),
            metadata=reader.metadata("prompt", "completion"),
        )
    ]


def _question_answer(reader: _Reader) -> list[Row]:
    """GSM8K (gold after ####), dm-mathematics, MAWPS, AQuA (options, rationale), SVAMP, OpenMathReasoning."""
    question = reader.string("question", "problem", "query", "Question", "context")
    if reader.get("Body") is not None:
        question = f"{reader.string('Body').rstrip('. ')}. {question}"
    if reader.get("options") is not None:
        question = "\n".join([question, *reader.strings("options")])
    elif reader.get("choices") is not None:
        question = "\n".join(
            [question, *(f"{_name(i)}. {c}" for i, c in enumerate(reader.strings("choices")))]
        )
    reply = reader.string(
        "generated_solution",
        "rationale",
        "chain_of_thought",
        "solution",
        "answer",
        "Answer",
        "expected_answer",
    )
    gold = reader.string("expected_answer", "correct", "answer", "Answer", "solution")
    if "####" in gold:
        gold = gold.rsplit("####", 1)[1]
    elif reader.get("rationale", "chain_of_thought") is not None and gold.strip() not in reply[-80:]:
        reply = f"{reply.rstrip()}\nAnswer: {gold.strip()}"
    prompt: list[Message] = [{"role": "user", "content": question}]
    meta = reader.metadata("question", "answer")
    return [_answered(reader, reader.with_system(prompt), reply, answer=gold.strip(), metadata=meta)]


def _mbpp(reader: _Reader) -> list[Row]:
    tests = reader.strings("test_list")
    question = (
        f"{reader.string('text', 'prompt')}\nYour code should pass this test:\n{tests[0] if tests else ''}"
    )
    called = re.search(r"(\w+)\s*\(", tests[0].replace("assert", "", 1)) if tests else None
    code = reader.optional_string("code").replace("\r\n", "\n")
    reply = f"```python\n{code.strip()}\n```" if code else None
    meta = {**reader.metadata("text"), "setup": reader.optional_string("test_setup_code"), "solution": code}
    return [
        _answered(
            reader,
            [{"role": "user", "content": question.strip()}],
            reply,
            tests=tuple(tests),
            entry_point=called[1] if called else None,
            metadata=meta,
        )
    ]


def _human_eval(reader: _Reader) -> list[Row]:
    start = reader.string("prompt")
    solution = reader.optional_string("canonical_solution")
    meta = {**reader.metadata("prompt"), "prefix": start, "solution": start + solution if solution else ""}
    return [
        _answered(
            reader,
            [{"role": "user", "content": f"Complete this function:\n```python\n{start.rstrip()}\n```"}],
            f"```python\n{(start + solution).rstrip()}\n```" if solution else None,
            tests=(reader.string("test"),),
            entry_point=reader.string("entry_point"),
            metadata=meta,
        )
    ]


def _exercise(reader: _Reader) -> list[Row]:
    """Exercism: an exercise in words, the file to fill in and a unittest file."""
    starter, solution = reader.optional_string("starter"), reader.optional_string("solution")
    question = reader.string("prompt").rstrip() + (
        f"\n\n```python\n{starter.rstrip()}\n```" if starter else ""
    )
    return [
        _answered(
            reader,
            [{"role": "user", "content": question}],
            f"```python\n{solution.rstrip()}\n```" if solution else None,
            tests=(reader.string("test"),),
            metadata={**reader.metadata("prompt"), "solution": solution},
        )
    ]


def _answered(
    reader: _Reader,
    prompt: list[Message],
    reply: str | None,
    *,
    answer: str | None = None,
    tests: tuple[str, ...] = (),
    entry_point: str | None = None,
    metadata: Mapping[str, Any],
) -> Row:
    """A prompt with one good reply (or none)."""
    turns = reader.checked(prompt, "prompt")
    reply_turn: Message = {"role": "assistant", "content": reply or ""}
    messages = None if reply is None else (*turns, reply_turn)
    return Row(
        text=_as_text(messages or turns),
        messages=messages,
        prompt=turns,
        responses=() if reply is None else ((reply_turn,),),
        answer=answer,
        tests=tests,
        entry_point=entry_point,
        template_kwargs=reader.template_kwargs(),
        metadata=metadata,
    )


def _prompt_only(reader: _Reader) -> list[Row]:
    for half, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if reader.get(half) is not None:  # a prompt alone would be taken, and the pair be lost without a word
            raise NurtureError(f"{reader.where}: key '{other}' is missing, there is only '{half}'")
    turns = reader.checked(reader.with_system(reader.turns("prompt", "user")), "prompt")
    answer = reader.optional_string("answer", "ground_truth", "gold") or None
    meta = reader.metadata("prompt")
    return [
        Row(
            text=_as_text(turns),
            prompt=turns,
            answer=answer,
            template_kwargs=reader.template_kwargs(),
            metadata=meta,
        )
    ]


def _document(reader: _Reader) -> list[Row]:
    return [Row(text=reader.string("text", "content"), metadata=reader.metadata("text", "content"))]


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[_Reader], list[Row]]], ...] = (
    (("chosen", "rejected"), _preference),
    (("responses", "ranking|ranks|ratings|scores"), _ranking),
    (("response1", "response2", "annotator1|label"), _two_responses),
    (("output_1", "output_2", "label"), _two_responses),
    (("messages|conversations|conversation",), _conversation),
    (("message_tree_id", "prompt"), _message_tree),
    (("instruction", "instances"), _self_instruct),
    (("test_list",), _mbpp),
    (("prompt", "test", "entry_point"), _human_eval),
    (("prompt", "test", "module"), _exercise),
    (("prompt", "completion|response"), _prompt_completion),
    (("instruction", "output|response|completion"), _instruction_output),
    (
        (
            "question|problem|query|Question|context",
            "answer|Answer|solution|expected_answer|generated_solution|rationale",
        ),
        _question_answer,
    ),
    (("prompt",), _prompt_only),
    (("text|content",), _document),
)

_KNOWN_KEYS = sorted({name for keys, _ in _FORMATS for key in keys for name in key.split("|")})


def _unrecognised(record: Mapping[str, Any], where: str) -> str:
    keys = [str(key) for key in record]
    empty = [key for key in keys if key in _KNOWN_KEYS and record[key] is None]
    if empty:
        return f"{where}: key '{empty[0]}' is null"
    unknown = (key for key in keys if key not in _KNOWN_KEYS)
    near = next((f" '{key}':{hint}" for key in unknown if (hint := did_you_mean(key, _KNOWN_KEYS))), "")
    partial = [key for key in keys if key in _KNOWN_KEYS]
    if partial:
        wanted = [
            " + ".join(names) for names, _ in _FORMATS if any(partial[0] in n.split("|") for n in names)
        ]
        return (
            f"{where}: key '{partial[0]}' alone is not a row; formats with it: {'; '.join(wanted)}."
            f" Keys found: {', '.join(keys)}.{near}"
        )
    return (
        f"{where}: no known row format has the keys {', '.join(keys) or '(none)'}.{near} Accepted: text; messages;"
        " prompt + completion; instruction + output; question + answer; prompt + chosen + rejected; prompt +"
        " responses + ranking (docs/data.md lists all)"
    )


# ---- small helpers ----------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _written_out(value: float | bool) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _as_text(turns: Sequence[Message]) -> str:
    return "\n\n".join(turn.get("content") or "" for turn in turns)


def _until_reply(turns: Sequence[Message]) -> list[Message]:
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return list(turns[:first] or turns)


def ranking_text(ranking: Sequence[Sequence[int]]) -> str:
    """Return the ranking as people write it, `D > C > A = B`: the inverse of `parse_ranking`."""
    return " > ".join(" = ".join(_name(index) for index in group) for group in ranking)


def _name(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _letter(name: str, count: int, where: str) -> int:
    name = name.strip()
    names = [_name(i) for i in range(count)]
    if name not in names:
        raise NurtureError(f"{where}: 'ranking' names '{name}', but the responses are A to {names[-1]}")
    return names.index(name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
