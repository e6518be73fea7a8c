"""lm-evaluation-harness through our model class against its `hf` backend: the same checkpoint, the same local files.

    python bench/lm_eval_parity.py smollm2 --data ../shared/data --limit 100 --json

The checkpoint is written as a Hugging Face folder first, so that transformers reads what we read. Items are compared
one by one: the largest difference of a log-likelihood, and how many generations are equal letter by letter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS = ("local_blimp", "local_arc_easy", "local_piqa", "local_lambada", "local_gsm8k")
_CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: '{text}'
doc_to_target: '{target}'
doc_to_choice: '{choice}'
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_LAMBADA = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
validation_split: validation
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{continuation}}}}"
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""
_GSM8K = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:", "\\n\\n"], do_sample: false, max_gen_toks: 48}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(folder: Path, data: Path) -> None:
    """Write the task files, over the rows in `data` (the layout of ../shared/data)."""
    query = {"text": "{{query}}", "target": "{{gold}}", "choice": "{{choices}}"}
    pairs = {"text": "", "target": "0", "choice": "{{[sentence_good, sentence_bad]}}"}
    for name, file, form in (
        ("local_blimp", "blimp/adjunct_island.jsonl.gz", pairs),
        ("local_arc_easy", "core-eval/arc_easy.jsonl.gz", query),
        ("local_piqa", "core-eval/piqa.jsonl.gz", query),
    ):
        text = _CHOICE.format(name=name, file=data / file, **form)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "local_lambada.yaml").write_text(
        _LAMBADA.format(name="local_lambada", file=data / "core-eval/lambada.jsonl.gz")
    )
    (folder / "local_gsm8k.yaml").write_text(
        _GSM8K.format(name="local_gsm8k", file=data / "gsm8k/train.jsonl.gz")
    )


def evaluate(model: Any, folder: Path, tasks: tuple[str, ...], limit: int) -> dict[str, Any]:
    """Return lm-eval's results and samples of a model object on the tasks in `folder`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each task both sides' metrics and how far the answers differ, item by item."""
    table = {}
    for task, samples in ours["samples"].items():
        pairs = list(zip(samples, theirs["samples"][task], strict=True))
        assert all(a["doc_hash"] == b["doc_hash"] for a, b in pairs)
        furthest, equal = 0.0, 0
        for a, b in pairs:
            first, second = (sample["filtered_resps"] for sample in (a, b))
            equal += first == second or isinstance(first[0], (list, tuple))
            if isinstance(first[0], (list, tuple)):
                furthest = max([furthest, *(abs(float(x[0]) - float(y[0])) for x, y in zip(first, second))])
        metrics = {
            name.split(",")[0]: (value, theirs["results"][task][name])
            for name, value in ours["results"][task].items()
            if isinstance(value, float) and "stderr" not in name
        }
        table[task] = {"metrics": metrics, "n": len(pairs), "furthest": furthest, "equal": equal}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    from nurture.evals.lm_eval_model import NurtureLM
    from nurture.model.hugging_face import save_model

    ours = NurtureLM(path=args.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder, checkpoint = Path(temporary), Path(temporary) / "checkpoint"
        checkpoint.mkdir()
        tokenizer = ours._tokenizer
        save_model(
            ours.model,
            checkpoint,
            end_token_ids=tokenizer.stop_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.document_token_id,
        )
        tokenizer.save(checkpoint)
        write_tasks(folder, args.data.resolve())
        tasks = tuple(args.tasks.split(","))
        started = time.perf_counter()
        mine = evaluate(ours, folder, tasks, args.limit)
        ours_seconds = time.perf_counter() - started
        peer = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=8)
        started = time.perf_counter()
        theirs = evaluate(peer, folder, tasks, args.limit)
        peer_seconds = time.perf_counter() - started
    for task, line in compare(mine, theirs).items():
        if args.json:
            print(json.dumps({"name": f"lm_eval/{task}", **line}))
        else:
            print(task, line)
    seconds = {"name": "lm_eval/seconds", "ours": ours_seconds, "peer": peer_seconds}
    seconds["ratio"] = peer_seconds / ours_seconds
    print(json.dumps(seconds) if args.json else seconds)


if __name__ == "__main__":
    main()
