"""vLLM in the engine's place: the same prompts in, the same episodes with logprobs out, on a GPU.

The weights of the model are pushed into vLLM's own copy whenever they have changed, by the names of the checkpoint
format, and its prefix cache is forgotten with them: cached keys of older weights would be another policy. Turns of an
episode are requests of growing length; the prefix cache spares what they share.

Logprobs are those of softmax(logits / temperature), as the engine's are. vLLM renormalises over what top-k, top-p and
min-p leave, which the trainer cannot follow (huggingface/trl#6789), so truncation is refused here. Its kernels are not
the trainer's even at equal weights: how far they are apart is `rl/sampling_kl`, and the importance weights of
`losses.policy.sampling_correction` make up for it (`rollout_precision: vllm` switches them on). Main failure mode:
that distance grows while the reward still rises.

Source: vLLM 0.22 to 0.33 (`LLM.generate`, `LLM.apply_model`, `logprobs_mode`); Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training" for the correction.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nurture.errors import NurtureError
from nurture.inference.engine import Completion, Episode, Respond, silence, weights_version
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.model.weights import checkpoint_tensors

MEMORY_SHARE = 0.4
"""Of the GPU's memory, for vLLM's weights and cache; the trainer needs the rest."""
_SEEDS = 2**31


class VllmEngine:
    """Plays episodes with vLLM; `rollout.Sampler` like the engine."""

    def __init__(
        self, model: Transformer, *, max_batch: int = 256, memory_share: float = MEMORY_SHARE
    ) -> None:
        """Start vLLM in this process, beside the trainer, with the model's configuration.

        Args:
            model: the policy; not changed.
            max_batch: most sequences decoded at once.
            memory_share: of the GPU's memory.

        Raises:
            NurtureError: vLLM is not installed, or there is no GPU for it.
        """
        # Workers of their own would need every push of the weights to be pickled.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ModuleNotFoundError as missing:
            if missing.name != "vllm":
                raise
            raise NurtureError(
                "rollout_precision: vllm needs vLLM on a machine with a GPU: pip install vllm"
            ) from None
        if not torch.cuda.is_available():
            raise NurtureError("rollout_precision: vllm needs a GPU; without one use fp32 or bf16")
        self.model, self._vllm = model, vllm
        with tempfile.TemporaryDirectory(prefix="nurture-vllm-") as folder:
            save_model(model, folder)
            self._llm = vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=model.config.max_position,
                max_num_seqs=max_batch,
                gpu_memory_utilization=memory_share,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # after the temperature
            )
        self._weights_seen = weights_version(self.model)

    def refresh(self) -> None:
        """Push the model's weights as they are now; called by itself when they were changed in place."""
        tensors = list(
            checkpoint_tensors(self.model.config, self.model.head, dict(self.model.named_parameters()))
        )

        def load(inside: Any) -> None:
            inside.load_weights((name, tensor.detach()) for name, tensor in tensors)

        self._llm.apply_model(load)
        self._llm.reset_prefix_cache()
        self._weights_seen = weights_version(self.model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
        ended: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt; arguments and errors as `Engine.generate`."""
        return [episode.turns[0] for episode in self.converse(prompts, silence(ended), params, seeds)]

    def converse(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        params: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Episode]:
        """Play out an episode after every prompt, all of them turn by turn; arguments as `Engine.converse`.

        Raises:
            NurtureError: sampling is truncated, or a prompt is empty or leaves no room in the context.
        """
        params = params or SamplingParams()
        if params.truncates:
            raise NurtureError(
                "vLLM reports logprobs of the truncated distribution, which the trainer cannot compute: "
                "sample without top_k, top_p and min_p"
            )
        if weights_version(self.model) != self._weights_seen:
            self.refresh()
        context = min(max_length or self.model.config.max_position, self.model.config.max_position)
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise NurtureError(
                    f"prompt {index} has {len(prompt)} tokens; between 1 and {context - 1} fit into the context"
                )
        seeds = sequence_seeds(params.seed, len(prompts)) if seeds is None else seeds
        written = [list(prompt) for prompt in prompts]
        episodes = [Episode() for _ in prompts]
        going = list(range(len(prompts)))
        while going:
            turns = self._turns(written, going, params, seeds, episodes, context)
            for index, turn in zip(going, turns, strict=True):
                episodes[index].turns.append(turn)
                written[index] += turn.token_ids
            answers = respond(list(zip(going, turns, strict=True)))
            still = []
            for index, answer in zip(going, answers, strict=True):
                if answer is None:
                    continue
                if len(written[index]) + len(answer) >= context:
                    episodes[index].is_full = True
                    continue
                episodes[index].answers.append(list(answer))
                written[index] += answer
                still.append(index)
            going = still
        return episodes

    def _turns(
        self,
        written: list[list[int]],
        going: list[int],
        params: SamplingParams,
        seeds: Sequence[int],
        episodes: list[Episode],
        context: int,
    ) -> list[Completion]:
        """Have the next turn of every episode in `going` written."""
        asked = [
            self._vllm.SamplingParams(
                max_tokens=min(params.max_tokens, context - len(written[index])),
                temperature=params.temperature,
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,  # our stop tokens, not those of generation_config.json
                detokenize=False,
                logprobs=0,  # of the token that was drawn
                seed=sequence_seeds(seeds[index], len(episodes[index].turns) + 1)[-1] % _SEEDS,
            )
            for index in going
        ]
        requests = [{"prompt_token_ids": written[index]} for index in going]
        outputs = self._llm.generate(requests, sampling_params=asked, use_tqdm=False)
        return [_completion(output.outputs[0]) for output in outputs]


def _completion(output: Any) -> Completion:
    token_ids = list(output.token_ids)
    logprobs = [place[token].logprob for token, place in zip(token_ids, output.logprobs, strict=True)]
    return Completion(token_ids, logprobs, "stop" if output.finish_reason == "stop" else "length")
