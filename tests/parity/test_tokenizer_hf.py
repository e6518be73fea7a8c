"""Our tokenizer against transformers: the same directory, the same ids, the same text, the same mask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nurture.tokenizer import SPECIAL_TOKENS, Tokenizer

transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers (pip install 'nurture[test]')"
)

TEXTS = [
    f"The {word} number {n} is {n * 7}: naïve café, 東京, 🎉!\n\n\tdef f(x):\n        return x\n"
    for n in range(30)
    for word in ("red", "sea")
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there\n"},
    {"role": "assistant", "content": "\n Hi 🎉", "reasoning_content": "a greeting"},
    {"role": "user", "content": "and\n\nnow?"},
    {"role": "assistant", "content": ""},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "<think>\n\n</think>\nDone 東京"},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    ours = Tokenizer.train(TEXTS, 330)
    ours.save(directory)
    return ours, transformers.AutoTokenizer.from_pretrained(directory), directory


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_ids_and_text_are_identical(pair, text):
    ours, theirs, _ = pair
    if any(token in text for token in SPECIAL_TOKENS):
        return  # the one deliberate difference
    token_ids = ours.encode(text)
    assert theirs(text)["input_ids"] == token_ids
    assert theirs.decode(token_ids) == ours.decode(token_ids) == text


def test_real_text(pair, shared_data):
    import gzip

    ours, theirs, _ = pair
    with gzip.open(shared_data / "iot-course" / "ja.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    assert theirs(text)["input_ids"] == ours.encode(text)


def test_special_ids_are_known_to_transformers(pair):
    ours, theirs, _ = pair
    assert theirs.eos_token_id == ours.end_of_turn_id
    assert theirs.pad_token_id == ours.pad_token_id
    assert theirs.bos_token_id == ours.document_token_id
    assert len(theirs) == ours.vocab_size
    token_ids = list(range(len(SPECIAL_TOKENS)))
    assert theirs.decode(token_ids) == ours.decode(token_ids) == "".join(SPECIAL_TOKENS)
    assert theirs.decode(token_ids, skip_special_tokens=True) == ours.decode(token_ids, skip_special=True)


def test_saved_by_transformers_and_loaded_here(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.stop_token_ids == ours.stop_token_ids
    assert again.chat_template == ours.chat_template
    assert again.encode_conversation(CONVERSATION) == ours.encode_conversation(CONVERSATION)


@pytest.mark.parametrize("length", range(2, len(CONVERSATION) + 1))
def test_conversation_and_mask(pair, length):
    ours, theirs, _ = pair
    messages = CONVERSATION[:length]
    token_ids, mask = ours.encode_conversation(messages)
    reference = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert reference["input_ids"] == token_ids
    assert [bool(m) for m in reference["assistant_masks"]] == mask


def test_prompt(pair):
    ours, theirs, _ = pair
    messages = CONVERSATION[:2]
    reference = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert reference["input_ids"] == ours.encode_prompt(messages)
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.render(messages)


# ---- templates of other families ------------------------------------------------------------------------------

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_LIKE = (
    "{%- set ns = namespace(last=-1) %}\n{%- for message in messages %}\n    {%- if message.role == 'user' %}\n"
    "        {%- set ns.last = loop.index0 %}\n    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n"
    "    {%- set content = message.content %}\n    {%- if message.role == 'assistant' and '</think>' in content and"
    " loop.index0 < ns.last %}\n        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "    {%- endif %}\n    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
)


@pytest.mark.parametrize("template", [SMOLLM2, QWEN_LIKE])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_templates_render_as_in_transformers(pair, template, options):
    ours, theirs, _ = pair
    messages = [*CONVERSATION, {"role": "user", "content": "last"}]
    changed = ours.with_chat_template(template)
    for prompt in (False, True):
        reference = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **options
        )
        assert changed.render(messages, add_generation_prompt=prompt, **options) == reference


def test_mask_of_an_untagged_template_equals_the_tagged_one(pair):
    ours, theirs, _ = pair
    tagged = SMOLLM2.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% else %}{{message['content'] + '<|im_end|>'}}"
        "{% endif %}{{'\n'}}",
    )
    messages = CONVERSATION[1:5]
    token_ids, mask = ours.with_chat_template(SMOLLM2).encode_conversation(messages)
    reference = theirs.apply_chat_template(
        messages, chat_template=tagged, return_assistant_tokens_mask=True, return_dict=True
    )
    assert reference["input_ids"] == token_ids
    assert [bool(m) for m in reference["assistant_masks"]] == mask


def test_added_tokens_that_swallow_space(pair, tmp_path):
    """Phi's end token takes the white space after it; splitting must do the same."""
    ours, _, directory = pair
    for file in Path(directory).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][2]["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    theirs.chat_template = ours.chat_template
    token_ids, _ = Tokenizer.load(tmp_path).encode_conversation(CONVERSATION)
    assert token_ids == theirs.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert token_ids != ours.encode_conversation(CONVERSATION)[0]
