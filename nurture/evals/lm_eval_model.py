"""Our checkpoints in lm-evaluation-harness: the model class `nurture`, equal to its `hf` backend on the same weights.

    python -m nurture.evals.lm_eval_model --model nurture --model_args path=runs/tiny/04-sft --tasks arc_easy

is `lm_eval` with our class registered; `path` is a stage, a checkpoint folder or a .gguf file. Everything a task asks
for is there: log-likelihoods, rolling log-likelihoods (each token predicted once, with as much context as fits), greedy
and sampled generation with stop strings, and the chat template. Needs `pip install 'nurture[lm-eval]'`; our own
package never imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nurture.evals.likelihood import score_continuations
from nurture.inference.chat import load_chat_model
from nurture.inference.engine import Completion, Engine
from nurture.inference.sampling import SamplingParams
from nurture.progress import Bar, progress_bar

_BLOCK = 32
"""Tokens written between two looks for a stop string."""
_ROWS = 16
"""Texts written side by side."""


@register_model("nurture")
class NurtureLM(TemplateLM):
    """A checkpoint of ours as lm-eval sees it."""

    def __init__(self, path: str, max_gen_toks: int = 256, batch_size: int | str = 1, **_: Any) -> None:
        """Load `path`: a stage of a run, a checkpoint folder or a .gguf file. Batches are by tokens, not by number."""
        super().__init__()
        chat = load_chat_model(path)
        self.model, self._tokenizer = chat.model.eval(), chat.tokenizer
        self.path, self.max_gen_toks, self.max_length = (
            path,
            int(max_gen_toks),
            chat.model.config.max_position,
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: what the tokenizer's own settings name."""
        named = self._tokenizer._setting("eos_token")
        return self._tokenizer.end_of_turn_id if named is None else named

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context: as in the `hf` backend the named bos, which need not be our document's."""
        named = self._tokenizer._setting("bos_token")
        return self.eot_token_id if named is None else named

    @property
    def tokenizer_name(self) -> str:
        """What request caches are kept under."""
        return f"nurture-{self._tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of `string`; no token is ever added."""
        return self._tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's template, for lm-eval's records."""
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text that the model was trained on."""
        return self._tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        scores = score_continuations(self.model, [(before, after) for _, before, after in requests])
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p(text) of every request: each token predicted once, in windows of the model's context."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, score_continuations(self.model, pairs), strict=True):
            totals[owner] += score.logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, cut at the first stop string."""
        alike: dict[tuple[int, float, float], list[int]] = {}
        for place, request in enumerate(requests):
            settings = request.args[1]
            limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or self.max_gen_toks)
            sampled = settings.get("do_sample", False)
            temperature = float(settings.get("temperature") or 0.0) if sampled else 0.0
            key = (limit, temperature, float(settings.get("top_p") or 1.0))
            alike.setdefault(key, []).append(place)
        texts = [""] * len(requests)
        with progress_bar("texts", len(requests), show=not disable_tqdm, stays=False) as bar:
            for (limit, temperature, top_p), places in alike.items():
                contexts = [requests[place].args[0] for place in places]
                stops = [_stop_strings(requests[place].args[1]) for place in places]
                written = self._write(contexts, stops, limit, temperature, top_p, bar)
                for place, text in zip(places, written, strict=True):
                    texts[place] = text
        return texts

    def _write(
        self,
        contexts: Sequence[str],
        stops: Sequence[list[str]],
        limit: int,
        temperature: float,
        top_p: float,
        bar: Bar,
    ) -> list[str]:
        """Generate side by side, in blocks until a stop string, the end of the text, or the limit."""
        ends = frozenset({self.eot_token_id, *self._tokenizer.stop_token_ids})
        params = SamplingParams(
            max_tokens=min(_BLOCK, limit), temperature=temperature, top_p=top_p, stop_token_ids=tuple(ends)
        )
        written: list[list[int]] = [[] for _ in contexts]

        def text(index: int) -> str:
            kept = [token for token in written[index][:limit] if token not in ends]
            return self._tokenizer.decode(kept, skip_special=True)

        def go_on(turns: list[tuple[int, Completion]]) -> list[list[int] | None]:
            answers: list[list[int] | None] = []
            for index, turn in turns:
                written[index] += turn.token_ids
                so_far = text(index)
                over = turn.finish_reason == "stop" or len(written[index]) >= limit
                over = over or any(stop in so_far for stop in stops[index])
                answers.append(None if over else [])
            bar.advance(answers.count(None))
            return answers

        prompts = [self.tok_encode(context)[-(self.max_length - limit) :] for context in contexts]
        Engine(self.model, max_batch=_ROWS).converse(prompts, go_on, params)
        texts = [text(index) for index in range(len(contexts))]
        for index, cuts in enumerate(stops):
            for stop in cuts:
                texts[index] = texts[index].split(stop)[0]
        return texts


def _stop_strings(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
