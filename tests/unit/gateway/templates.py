"""Chat templates in the styles of well-known families, written for these tests."""

from __future__ import annotations

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{%- if tools is not none %}{{- raise_exception('tools were given') }}{% endif %}
{%- if system or documents is not none %}
    {{- '<|user|>system\\n\\n' + system + '<|eos|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('Unexpected role: ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\\n' + message.content | trim + '<|eos|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
"""

QWEN = """{%- set ns = namespace(last=-1, parts=[]) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}
        {%- set ns.last = (messages | length) - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|user|>system\\nBe helpful.<|eos|>\\n' }}
    {%- endif %}
    {%- if message.content is string %}{% set content = message.content %}{% endif %}
    {%- if loop.index0 > ns.last and message.role == 'assistant' %}
        {%- generation %}{{- '<|assistant|>' + content.split('</think>')[-1].lstrip('\\n') }}
        {%- endgeneration %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {{- '<|user|>' + message.role + '\\n' + content + '<|eos|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- 'no thoughts' }}{% endif %}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

DATED = """{% set date = strftime_now("%Y-%m-%d") %}
Today is {{ date }}.
{% for message in messages %}
  {{ message | tojson }}
  {{ dict(role=message.role, tags=["<", "'"]) | tojson(indent=2) }}
  {{ message.content | tojson(ensure_ascii=True) }}
{% endfor %}
"""

ALL = {"llama": LLAMA, "qwen": QWEN, "mistral": MISTRAL, "dated": DATED}

BREAKING = {
    "raise": "{{ raise_exception('no such conversation') }}",
    "undefined": "{{ messages[0].nothing.more }}",
    "type": "{{ messages[0].content + 1 }}",
    "zero": "{{ 1 // (messages | length - 1) }}",
    "key": "{{ {}['a'].b }}",
    "value": "{{ 'a' | int(base='x') }}{{ '%d' | format('a') }}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "sandbox": "{{ messages.__class__.__mro__ }}",
    "sandbox-call": "{{ ''.__class__.__base__.__subclasses__() }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "memory": "{{ strftime_now }}{{ strftime_now(1) }}",
}
"""Each breaks on one message in a way of its own."""
