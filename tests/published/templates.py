"""
Chat templates as they are published: those of llava-hf checkpoints to the byte (their size is the published file's), those
of language models with the same behaviour in fewer words.
"""

_ROLE = "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
_OLD_ROLE = (
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
)
_IMAGES = (
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>IMAGE_END' }}{% endfor %}"
    "{# Render all text next #}"
)
_TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
_SPACED = _TEXTS + "{{ content['text'] + ' '}}{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"


def _marked(images: str, text: str, role: str, end: str, prompt: str) -> str:
    return (
        "{% for message in messages %}" + role + images + "{% if message['role'] != 'assistant' %}"
        f"{_TEXTS}{text}{{% endfor %}}{{% else %}}"
        f"{_TEXTS}{{% generation %}}{text}{{% endgeneration %}}{{% endfor %}}{{% endif %}}{end}{{% endfor %}}{prompt}"
    )


# llava-hf/llava-1.5-*-hf, chat_template.json: 700 bytes (July 2024, with {% generation %}), 488 ("Fix system message") and
# 533 (the first one) as `{"chat_template": …}` with an indent of 2. An answer ends with a blank.
LLAVA_HF = _marked(_IMAGES.replace("IMAGE_END", "\n"), "{{ content['text'] + ' '}}", _ROLE, "", _PROMPT)
LLAVA_HF_UNMARKED = (
    "{% for message in messages %}" + _ROLE + _IMAGES.replace("IMAGE_END", "\n") + _SPACED + "{% endfor %}" + _PROMPT
)
LLAVA_HF_FIRST = (
    "{% for message in messages %}"
    + _OLD_ROLE
    + _IMAGES.replace("IMAGE_END", "\n")
    + _SPACED
    + "{% endfor %}"
    + _PROMPT
)

# llava-hf/llava-interleave-qwen-*-hf: 699 bytes. The stop stands behind {% endgeneration %}.
INTERLEAVE_QWEN = _marked(
    _IMAGES.replace("IMAGE_END", ""),
    "{{ '\n' + content['text'] }}",
    "{{'<|im_start|>' + message['role'] + '\n'}}",
    "{{'<|im_end|>' + '\n'}}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)

# ---- Language models: strings only ----

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)

LLAMA3 = (  # Meta-Llama-3-8B-Instruct; `trim` turns a content list into its Python text
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _chatml(default_system: str) -> str:
    return (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\n{default_system}<|im_end|>\n' }}}}{{% endif %}}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


QWEN2_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN2, QWEN25 = _chatml(QWEN2_SYSTEM), _chatml(QWEN25_SYSTEM)

QWEN3 = (  # thoughts of earlier turns are dropped, an empty one is written into the last answer
    "{% set ns = namespace(last=messages|length - 1) %}"
    "{% for message in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}"
    "{% if ns.found is not defined and message.role == 'user' %}{% set ns.last = index %}{% set ns.found = true %}{% endif %}"
    "{% endfor %}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% set content = message.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

MISTRAL = (  # Mistral-7B-Instruct-v0.2: no system turn, strict alternation, [INST] is text
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

PHI3 = (  # Phi-3-mini-4k-instruct: a conversation without a prompt ends with the tokenizer's EOS as well
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

GEMMA = (  # gemma-2b-it, gemma-2-2b-it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
