"""The tokenizer: text to token ids and back, without losing a byte.

Byte-level BPE: text is cut into words by a regular expression (digits one by one, so that numbers line up), each
word is a string of bytes, and the most frequent adjacent pairs were merged into new tokens during training. Every
byte is a token, so any text can be encoded and `decode(encode(text)) == text`.

A `Tokenizer` is trained here, or loaded from any Hugging Face directory with a byte-level `tokenizer.json` (the
SmolLM, Llama 3 and Qwen families), or made of parts (GGUF). Saved directories load in transformers with identical
ids. It also renders conversations (chat_template.py) and says which of their tokens the assistant wrote.

The one deliberate difference from transformers: control tokens are only ever written by code. "<|im_end|>" in a
document or in a user's message is encoded as the ordinary characters it consists of.

Papers: Sennrich et al. 2016 (arXiv 1508.07909) for BPE, Radford et al. 2019 (GPT-2) for the byte level.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from nurture import chat_template as chat
from nurture.errors import NurtureError, did_you_mean
from nurture.files import atomic_write_json, read_json
from nurture.recipe import Section
from nurture.types import Message

DOCUMENT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (DOCUMENT, TURN_START, TURN_END, PAD, "<think>", "</think>", "<tool_call>", "</tool_call>")
"""Our own tokenizers' special tokens; the position is the id."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class TokenizerConfig(Section):
    """The tokenizer of a run."""

    vocab_size: int = 2048
    """Number of token ids, special tokens included."""
    path: str | None = None
    """Load the tokenizer of this checkpoint directory instead of training one."""
    sample_bytes: int = 20_000_000
    """Bytes of training text the merges are learned from."""


class Tokenizer:
    """Text to token ids and back; conversations to token ids and a completion mask.

    Attributes:
        vocab_size: V, one more than the largest token id.
        document_token_id: E, the token every pretraining document starts with.
        end_of_turn_id: the token that closes an assistant turn.
        pad_token_id: fills rows; never trained, never attended to.
        stop_token_ids: tokens that end a generated reply.
        chat_template: jinja source, or None (a base model without one).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None,
        settings: Mapping[str, Any],
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._settings = dict(settings)
        self.chat_template = chat_template
        description = json.loads(backend.to_str())
        if "ByteLevel" not in json.dumps(description.get("decoder")):
            raise NurtureError(
                "this tokenizer is not byte-level BPE, so text would not survive a round trip; use a model of the"
                " SmolLM, Llama 3 or Qwen family, or train a tokenizer"
            )
        self._control = {t["content"]: t for t in description["added_tokens"] if _is_control(t)}
        self._plain = _without_control(description, self._control)
        self._pieces = _splitter(tuple(self._control.values()))
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self._find_special_ids()

    # ---- making one -------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE of at most `vocab_size` tokens. The same texts give the same tokenizer.

        Raises:
            NurtureError: `vocab_size` leaves no room for the bytes, or there is no text.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise NurtureError(
                f"tokenizer.vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and"
                f" {len(SPECIAL_TOKENS)} special tokens), got {vocab_size}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True, trim_offsets=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[_special_token(content) for content in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        seen = _CountingIterator(texts)
        backend.train_from_iterator(seen, trainer)
        if seen.count == 0:
            raise NurtureError(
                "there is no text to train the tokenizer on; check the data of the first stage"
            )
        description = json.loads(backend.to_str())
        for token in description["added_tokens"]:  # the trainer makes all of them special
            token["special"] = _special_token(token["content"]).special
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        return cls.from_parts(
            backend, chat_template=chat.CHATML, bos_token=DOCUMENT, eos_token=TURN_END, pad_token=PAD
        )

    @classmethod
    def from_parts(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> Tokenizer:
        """Wrap a `tokenizers.Tokenizer` whose control tokens are added tokens (what GGUF files hold)."""
        names = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            **{name: token for name, token in names.items() if token is not None},
        }
        return cls(backend, chat_template=chat_template, settings=settings, eos_token_ids=eos_token_ids)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint directory.

        Raises:
            NurtureError: the directory or its tokenizer.json is missing, or a file is not readable as what it is.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise NurtureError(_missing(directory, file))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise NurtureError(
                f"{file}: not a tokenizer ({error}); copy it again from the checkpoint"
            ) from error
        settings = _read_json(directory / "tokenizer_config.json")
        template = _read_template(directory, settings)
        try:
            return cls(
                backend,
                chat_template=template,
                settings=settings or {"tokenizer_class": "PreTrainedTokenizerFast"},
                eos_token_ids=_read_eos_ids(directory),
            )
        except NurtureError as error:
            named = str(error).startswith(
                f"{directory}"
            )  # another file of the checkpoint is at fault, and says so
            raise NurtureError(str(error) if named else f"{file}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {**self._settings, **self._named_tokens()}
        settings.pop("chat_template", None)
        (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        atomic_write_json(directory / "tokenizer_config.json", settings)
        atomic_write_json(directory / "special_tokens_map.json", self._named_tokens())
        template = directory / "chat_template.jinja"
        if self.chat_template is None:
            template.unlink(missing_ok=True)
        else:
            template.write_text(self.chat_template, encoding="utf-8")

    def with_chat_template(self, template: str | None = None) -> Tokenizer:
        """Return this tokenizer with another chat template; without argument our ChatML one.

        Where the vocabulary has no ChatML tokens, turns are closed by the tokenizer's own end token instead.

        Args:
            template: jinja source, or a name of `chat_template.BUILT_IN`.
        """
        mode = chat.BUILT_IN.get(template or "chatml")
        if template is None or mode is not None:
            end = TURN_END if TURN_END in self._control else self._token(self.end_of_turn_id)
            template = chat.chatml_template(end=end, default_mode=mode or "")
        other = copy.copy(self)
        other.chat_template = template
        other.__dict__.pop("fingerprint", None)
        other._find_special_ids()
        return other

    def for_chat(self, template: str | None = None) -> Tokenizer:
        """Return this tokenizer with `template`; by default with its own, or (a base model's) with ours."""
        if template is None and self.chat_template is not None:
            return self
        return self.with_chat_template(template)

    # ---- text -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ordinary text. Control strings in it are ordinary characters."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts, in parallel."""
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise NurtureError(_not_text(texts)) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD.

        `skip_special` drops control tokens, except the thinking and tool tags.
        """
        kept = [int(t) for t in token_ids]
        if (
            skip_special
        ):  # not the library's: a tokenizer that was trained here has the tags among its special ones
            kept = [t for t in kept if t not in self._unsaid]
        return self._backend.decode(kept, skip_special_tokens=False)

    @cached_property
    def _unsaid(self) -> frozenset[int]:
        """Control tokens that are no part of a reply that users read."""
        names = [name for name, token in self._control.items() if token["special"]]
        return frozenset(self._control[name]["id"] for name in names if name not in chat.ASSISTANT_MAY_WRITE)

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """(V,) int64: bytes of text each token stands for, 0 for control tokens. Makes loss per byte exact."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        added = {t["content"] for t in json.loads(self._backend.to_str())["added_tokens"]}
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if token not in self._control and token not in SPECIAL_TOKENS:
                lengths[token_id] = len(token.encode()) if token in added else len(token)
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides ids and masks; keys caches of tokenised data."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(f"{canonical}\0{self.chat_template}".encode()).hexdigest()

    def token_id(self, token: str) -> int | None:
        """Return the id of a token given as it is written in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    # ---- conversations ----------------------------------------------------------------------------------------

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **template_kwargs: Any
    ) -> str:
        """Return the conversation as the template writes it."""
        return chat.render_chat(
            self._template(),
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=self._variables(template_kwargs),
        ).plain_text

    def encode_conversation(
        self, messages: Sequence[Message], **template_kwargs: Any
    ) -> tuple[list[int], list[bool]]:
        """Return token ids and completion mask (True where the assistant wrote the token), both of length T.

        Raises:
            NurtureError: a message is malformed, or the template gives no exact mask.
        """
        return self.encode_conversations([messages], **template_kwargs)[0]

    def encode_conversations(
        self, conversations: Sequence[Sequence[Message]], **template_kwargs: Any
    ) -> list[tuple[list[int], list[bool]]]:
        """Encode many conversations, in parallel."""
        rendered = [
            chat.generation_spans(
                self._template(),
                messages,
                self._token(self.end_of_turn_id),
                control_strings=self._control,
                variables=self._variables(template_kwargs),
            )
            for messages in conversations
        ]
        return self._encode_rendered(rendered)

    def encode_prompt(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Return the token ids of the conversation followed by the header of the assistant's next turn."""
        rendered = chat.render_chat(
            self._template(),
            messages,
            add_generation_prompt=True,
            control_strings=self._control,
            variables=self._variables(template_kwargs),
        )
        return self._encode_rendered([rendered])[0][0]

    def _encode_rendered(self, rendered: Sequence[chat.RenderedChat]) -> list[tuple[list[int], list[bool]]]:
        """Split each text at its control tokens, encode what lies between, and mark tokens that touch a span."""
        split = [self._split(one) for one in rendered]
        ordinary = [text for pieces, _ in split for text, _, token_id in pieces if token_id is None]
        try:
            encodings = iter(self._plain.encode_batch(ordinary, add_special_tokens=False))
        except (TypeError, UnicodeEncodeError) as error:
            raise NurtureError(_not_text(ordinary)) from error
        result = []
        for pieces, spans in split:
            token_ids: list[int] = []
            bounds: list[tuple[int, int]] = []
            for text, start, token_id in pieces:
                if token_id is not None:
                    token_ids.append(token_id)
                    bounds.append((start, start + len(text)))
                    continue
                encoding = next(encodings)
                token_ids += encoding.ids
                bounds += [(start + first, start + last) for first, last in encoding.offsets]
            result.append((token_ids, _inside(bounds, spans)))
        return result

    def _split(
        self, rendered: chat.RenderedChat
    ) -> tuple[list[tuple[str, int, int | None]], list[tuple[int, int]]]:
        """Return (text, start, token id or None) pieces and the spans, in coordinates without guards."""
        text, guard = rendered.text, rendered.guard
        spans = [(start, end) for start, end in rendered.spans if end > start]
        if guard in text:
            spans = [(a - text.count(guard, 0, a), b - text.count(guard, 0, b)) for a, b in spans]
        pieces: list[tuple[str, int, int | None]] = []
        start = 0
        for index, piece in enumerate(self._pieces.split(text) if self._pieces else [text]):
            token_id = self._backend.token_to_id(piece.strip()) if index % 2 else None
            if index % 2 and token_id is None:
                token_id = self._backend.token_to_id(piece)
            piece = piece if token_id is not None else piece.replace(guard, "")
            if piece:
                pieces.append((piece, start, token_id))
            start += len(piece)
        return pieces, spans

    # ---- special tokens ---------------------------------------------------------------------------------------

    def _template(self) -> str:
        if self.chat_template is None:
            raise NurtureError(
                "this tokenizer has no chat template (a base model?); fine-tune it first, which gives it one:"
                " nurture sft --model PATH --data CHATS.jsonl"
            )
        return self.chat_template

    def _variables(self, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._named_tokens(), **template_kwargs}

    def _token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def _setting(self, name: str) -> int | None:
        """Return the id of a token named in tokenizer_config.json, where it is a string or an object."""
        value = self._settings.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        return self._backend.token_to_id(content) if isinstance(content, str) else None

    def _named_tokens(self) -> dict[str, str]:
        named = {name: self._setting(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {name: self._token(token_id) for name, token_id in named.items() if token_id is not None}

    def _find_special_ids(self) -> None:
        """Set the four special ids, each from the first place that knows it."""
        eos = [self._setting("eos_token"), *self._eos_token_ids]
        known_eos = [token_id for token_id in eos if token_id is not None]
        document = _first(
            self.token_id(DOCUMENT), self._setting("bos_token"), *known_eos, self.token_id("<|end_of_text|>")
        )
        end_of_turn = _first(self._probe_end_of_turn(), self.token_id(TURN_END), *known_eos, document)
        if document is None or end_of_turn is None:
            raise NurtureError(
                "no end-of-text token found: tokenizer_config.json must name a bos_token or an eos_token that is in"
                " the vocabulary"
            )
        self.document_token_id: int = document
        self.end_of_turn_id: int = end_of_turn
        pad = _first(
            self._setting("pad_token"), self.token_id(PAD), self.token_id("<|finetune_right_pad_id|>")
        )
        self.pad_token_id: int = document if pad is None else pad
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([end_of_turn, *known_eos, document]))

    def _probe_end_of_turn(self) -> int | None:
        """Return the control token the template writes right after an assistant's words."""
        if self.chat_template is None or self._pieces is None:
            return None
        probe: list[Message] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
        ]
        try:
            text = chat.render_chat(self.chat_template, probe, variables=self._named_tokens()).plain_text
        except NurtureError:
            return None
        match = self._pieces.search(text.rpartition("answer")[2])
        return self.token_id(match[0].strip()) if match else None


# ---- helpers --------------------------------------------------------------------------------------------------


def _special_token(content: str) -> AddedToken:
    # The thinking and tool tags are part of a reply that users read, so `skip_special` must not drop them.
    return AddedToken(content, special=content.startswith("<|"), normalized=False)


def _is_control(token: Mapping[str, Any]) -> bool:
    """Added tokens that text must not be able to write; runs of spaces and the like stay ordinary."""
    return bool(token["special"]) or re.fullmatch(r"<[^<>\s]+>|\[[A-Z_]+\]", token["content"]) is not None


def _without_control(description: dict[str, Any], control: Mapping[str, Any]) -> tokenizers.Tokenizer:
    plain = {**description, "post_processor": None, "truncation": None, "padding": None}
    plain["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in control]
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _splitter(control: tuple[Mapping[str, Any], ...]) -> re.Pattern[str] | None:
    """Return a pattern with one group that matches any control token (with the space some of them swallow)."""
    if not control:
        return None
    ordered = sorted(control, key=lambda token: len(token["content"]), reverse=True)
    parts = (
        (r"\s*" if token["lstrip"] else "")
        + re.escape(token["content"])
        + (r"\s*" if token["rstrip"] else "")
        for token in ordered
    )
    return re.compile(f"({'|'.join(parts)})")


def _inside(bounds: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each token's [start, end) whether it shares a character with a span. Both lists are sorted."""
    mask = []
    remaining = iter(spans)
    span = next(remaining, None)
    for start, end in bounds:
        while span is not None and span[1] <= start:
            span = next(remaining, None)
        mask.append(span is not None and span[0] < end)
    return mask


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


class _CountingIterator:
    """Passes texts on and counts the ones that are not empty."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.count = 0

    def __iter__(self) -> _CountingIterator:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.count += bool(text)
        return text


def _missing(directory: Path, file: Path) -> str:
    if not directory.exists():
        siblings = [p.name for p in directory.parent.iterdir()] if directory.parent.is_dir() else []
        return f"{directory}: no such directory.{did_you_mean(directory.name, siblings)}"
    if not directory.is_dir():
        return f"{directory}: is a file; the tokenizer is read from a checkpoint directory that holds tokenizer.json"
    older = [name for name in ("tokenizer.model", "vocab.json") if (directory / name).exists()]
    hint = f" It has {older[0]}: convert it with transformers' save_pretrained first." if older else ""
    return f"{file}: no such file, so {directory} holds no tokenizer.{hint}"


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = read_json(file, "Copy it again from the checkpoint.")
    if not isinstance(content, dict):
        raise NurtureError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def _read_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates: the one named default
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_eos_ids(directory: Path) -> list[int]:
    """Return the end tokens named by generation_config.json and config.json (one id or a list)."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return ids


def _not_text(texts: Sequence[Any]) -> str:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {index} of {len(texts)} is {type(text).__name__}, expected a string"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"text {index} of {len(texts)} is not valid Unicode: {error.reason} at character {error.start}"
    return "the texts cannot be encoded"
