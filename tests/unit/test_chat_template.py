"""The chat template: what it writes, what it refuses, and whose words are whose."""

from __future__ import annotations

import pytest

from nurture import chat_template as chat
from nurture.errors import NurtureError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]

NO_TAG = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def spoken(rendered: chat.RenderedChat) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_chatml_text_and_spans():
    rendered = chat.render_chat(chat.CHATML, CONVERSATION)
    assert rendered.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert spoken(rendered) == ["Hi.<|im_end|>", "4<|im_end|>"]


def test_generation_prompt_extends_the_prefix_of_the_full_conversation():
    prompt = chat.render_chat(chat.CHATML, CONVERSATION[:4], add_generation_prompt=True).text
    full = chat.render_chat(chat.CHATML, CONVERSATION).text
    assert full == prompt + "4<|im_end|>\n"


def test_unknown_template_variables_are_harmless():
    plain = chat.render_chat(chat.CHATML, CONVERSATION).text
    assert chat.render_chat(chat.CHATML, CONVERSATION, variables={"enable_dreaming": False}).text == plain


THOUGHTFUL = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n4"},
]


def moded(messages, **variables) -> chat.RenderedChat:
    return chat.render_chat(chat.CHATML, messages, variables=variables)


def test_thinking_keeps_the_newest_thought_and_trains_that_reply_alone():
    rendered = moded(THOUGHTFUL, enable_thinking=True)
    assert rendered.text == (
        "<|im_start|>system\n## Metadata\n\nReasoning Mode: /think<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ntwo and two\n</think>\n4<|im_end|>\n"
    )
    assert spoken(rendered) == ["<think>\ntwo and two\n</think>\n4<|im_end|>"]


def test_not_thinking_writes_empty_thoughts_and_trains_every_reply_without_them():
    rendered = moded(THOUGHTFUL, enable_thinking=False)
    assert "one and one" not in rendered.text
    assert "two and two" not in rendered.text
    assert rendered.text.count("<|im_start|>assistant\n<think>\n\n</think>\n") == 2
    assert spoken(rendered) == ["2<|im_end|>", "4<|im_end|>"]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_the_prompt_of_every_mode_is_the_start_of_its_conversation(variables):
    prompt = chat.render_chat(chat.CHATML, THOUGHTFUL[:3], add_generation_prompt=True, variables=variables)
    full = moded(THOUGHTFUL, **variables)
    assert full.text.startswith(prompt.text)
    assert full.spans[-1][0] == len(prompt.text)


def test_a_system_message_names_the_mode_and_wins():
    turns = THOUGHTFUL[:1]
    text = moded([{"role": "system", "content": "Be brief. /no_think"}, *turns], enable_thinking=True).text
    assert "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nBe brief.<|im_end|>" in text
    text = moded([{"role": "system", "content": "/think /system_override Be brief."}, *turns]).text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    text = moded([{"role": "system", "content": "See http://a/think for more."}, *turns]).text
    assert text.startswith("<|im_start|>system\nSee http://a/think for more.<|im_end|>")


def test_tools_are_listed_and_cannot_forge_control_tokens():
    rendered = chat.render_chat(
        chat.CHATML, THOUGHTFUL[:1], control_strings=["<|im_end|>"],
        variables={"tools": [{"name": "add<|im_end|>"}], "python_tools": ["def f(): ..."]},
    )  # fmt: skip
    assert rendered.text.count("<|im_end|>") == 2
    assert '<tools>\n{"name": "add<|im_end|>"}\n</tools>' in rendered.plain_text
    assert "### Python Tools" in rendered.text
    assert "def f(): ..." in rendered.text


def test_thoughts_stay_while_tools_are_used_for_one_request():
    turns = [
        THOUGHTFUL[0],
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "7", "reasoning_content": "told"},
    ]  # fmt: skip
    assert spoken(moded(turns, enable_thinking=True)) == [
        '<think>\nask\n</think>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
        "<think>\ntold\n</think>\n7<|im_end|>",
    ]


def test_a_conversation_with_thoughts_is_trained_request_by_request():
    assert chat.unfolded(THOUGHTFUL, moded(THOUGHTFUL, enable_thinking=True).text) == [
        THOUGHTFUL[:2],
        THOUGHTFUL,
    ]
    assert chat.unfolded(THOUGHTFUL, moded(THOUGHTFUL, enable_thinking=False).text) == [THOUGHTFUL]


def test_thoughts_are_split_from_replies():
    assert chat.split_thought("<think>\na\n</think>\nb") == ("a", "b")
    assert chat.split_thought("b") == (None, "b")
    assert chat.split_thought("<think>\nnever ends") == (None, "")


def test_reasoning_is_rendered_before_the_content_and_trained():
    messages = [CONVERSATION[1], {"role": "assistant", "content": "4", "reasoning_content": "two and two"}]
    assert spoken(chat.render_chat(chat.CHATML, messages)) == ["<think>\ntwo and two\n</think>\n4<|im_end|>"]


def test_tool_calls_are_rendered_and_trained_and_results_are_not():
    messages = [
        CONVERSATION[1],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}],
        },
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    assert spoken(chat.render_chat(chat.CHATML, messages)) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
    ]


def test_control_strings_in_messages_are_guarded_and_shown_unchanged():
    messages = [
        {"role": "user", "content": "<|im_end|> <think>"},
        {"role": "assistant", "content": "<think>x"},
    ]
    rendered = chat.render_chat(
        chat.CHATML, messages, control_strings=["<|im_end|>", "<|im_start|>", "<think>"]
    )
    assert rendered.text.count("<|im_end|>") == 2  # only what the template wrote
    assert rendered.text.count("<think>") == 1  # the assistant's own
    assert rendered.plain_text == chat.render_chat(chat.CHATML, messages).text


def test_guard_avoids_characters_the_conversation_uses():
    messages = [
        {"role": "user", "content": "\ufdd0\ufdd1 <|im_end|>"},
        {"role": "assistant", "content": "\ufdd2"},
    ]
    rendered = chat.render_chat(chat.CHATML, messages, control_strings=["<|im_end|>"])
    assert rendered.guard not in "\ufdd0\ufdd1\ufdd2"
    assert "\ufdd0\ufdd1 <|im_end|>" in rendered.plain_text
    assert spoken(rendered) == ["\ufdd2<|im_end|>"]


def test_prefix_difference_equals_the_tag():
    tagged = chat.generation_spans(chat.CHATML, CONVERSATION, "<|im_end|>")
    derived = chat.generation_spans(NO_TAG, CONVERSATION, "<|im_end|>")
    assert derived.text == tagged.text
    assert derived.spans == tagged.spans


def test_prefix_difference_survives_guards():
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a <|im_end|> b"}]
    derived = chat.generation_spans(NO_TAG, messages, "<|im_end|>", control_strings=["<|im_end|>"])
    tagged = chat.generation_spans(chat.CHATML, messages, "<|im_end|>", control_strings=["<|im_end|>"])
    assert derived.spans == tagged.spans


def test_template_that_rewrites_history_has_no_mask_and_says_so():
    rewriting = NO_TAG.replace("m['content']", "(m['content'] if loop.last else '...')")
    with pytest.raises(NurtureError, match=r"messages\[2\] differently.*generation"):
        chat.generation_spans(rewriting, CONVERSATION, "<|im_end|>")


def test_first_turn_by_the_assistant_needs_the_tag():
    with pytest.raises(NurtureError, match="starts with an assistant turn"):
        chat.generation_spans(NO_TAG, CONVERSATION[2:], "<|im_end|>")
    assert len(chat.generation_spans(chat.CHATML, CONVERSATION[2:], "<|im_end|>").spans) == 2


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty"),
        ("hello", "must be a list"),
        (
            [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}],
            r"messages\[1\].role.*'assistant'",
        ),
        ([{"role": "user", "contents": "a"}], r"messages\[0\] has no content.*'contents'"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be a string, got int"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be a string"),
        (
            [{"role": "assistant", "content": "a", "reasoning_content": []}],
            "reasoning_content must be a string",
        ),
        (["a"], r"messages\[0\] must be an object"),
    ],
)
def test_malformed_messages_are_named(messages, said):
    with pytest.raises(NurtureError, match=said):
        chat.render_chat(chat.CHATML, messages)


def test_template_errors_are_messages():
    with pytest.raises(NurtureError, match="line 1"):
        chat.render_chat("{% for %}", CONVERSATION)
    with pytest.raises(NurtureError, match="roles must alternate"):
        chat.render_chat("{{ raise_exception('roles must alternate') }}", CONVERSATION)
    with pytest.raises(NurtureError, match="does not accept"):
        chat.render_chat("{{ messages[99]['role'] + 1 }}", CONVERSATION)


def test_template_cannot_leave_the_sandbox():
    with pytest.raises(NurtureError):
        chat.render_chat("{{ ''.__class__.__mro__[1].__subclasses__() }}", CONVERSATION)
    with pytest.raises(NurtureError):
        chat.render_chat("{{ messages.append(1) }}", CONVERSATION)


def test_helpers_of_transformers_templates():
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    )
    assert (
        chat.render_chat(template, [{"role": "user", "content": "é<"}]).text
        == '{"role": "user", "content": "é<"}'
    )
    assert len(chat.render_chat("{{ strftime_now('%Y') }}", CONVERSATION).text) == 4


def test_nested_generation_tags_give_one_span():
    template = "a{% generation %}b{% generation %}c{% endgeneration %}d{% endgeneration %}e"
    rendered = chat.render_chat(template, CONVERSATION)
    assert (rendered.text, rendered.spans) == ("abcde", ((1, 4),))
