"""No operation of a template makes gigabytes, in time or memory: it is measured before it begins."""

import resource
import tracemalloc
from typing import Any

import jinja2
import pytest

from aiollm.text.bounds import MAX_CHARS, chars
from aiollm.text.chat import ChatTemplate
from aiollm.text.folder import TextError

MIB = 1 << 20
# Ten lists, each a thousand times in the next.
LAUGHS = "{% set ns = namespace(x=['ha']) %}{% for i in range(10) %}{% set ns.x = [ns.x] * 1000 %}{% endfor %}"
LARGE = "{% set x = 'a' * 1000000 %}"
DOUBLED = "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ... %}{% endfor %}{{ ns.x | length }}"
DOUBLINGS = [
    DOUBLED.replace("...", "ns.x + ns.x"),
    DOUBLED.replace("...", "ns.x ~ ns.x"),
    DOUBLED.replace("'a'", "[1]").replace("...", "ns.x + ns.x"),
    DOUBLED.replace("{% set ns.x = ... %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
]
REFUSED = r"""
{{ 'a' * 10000000000 }}
{{ [0] * 10000000000 }}
{{ 10000000000 * 'a' }}
{{ 9 ** (9 ** 9) }}
{{ (2 ** 65000) * (2 ** 65000) }}
{{ 'a' | center(2000000000) }}
{{ 'a' | center(width=2000000000) }}
{{ '%2000000000d' % 1 }}
{{ '%*d' % (2000000000, 1) }}
{{ '%.2000000000f' % 1 }}
{{ '%((a))2000000000d' % {'(a)': 1} }}
{{ '%2000000000d'.encode() % 1 }}
{{ '%2000000000d' | format(1) }}
{{ ['%2000000000d'] | map('format', 1) | join }}
{{ '%(a)-2000000000s' | format(a=1) }}
{{ ('%s' * 1000) % (('a' * 100000,) * 1000) }}
{{ 'a'.center(2000000000) }}
{{ 'a'.ljust(2000000000) }}
{{ 'a'.rjust(2000000000) }}
{{ 'a'.zfill(2000000000) }}
{{ 'a'.encode().zfill(2000000000) }}
{{ '\t'.expandtabs(2000000000) }}
{{ '\t'.expandtabs(tabsize=2000000000) }}
{{ (1).to_bytes(2000000000, 'big') }}
{{ ('a' | escape).center(2000000000) }}
{{ 'a'['center'](2000000000) }}
{{ '{:2000000000d}'.format(1) }}
{{ '{:{}}'.format(1, 2000000000) }}
{{ '{:{w}}'.format(1, w='2000000000') }}
{{ '{a:2000000000}'.format_map({'a': 1}) }}
{{ ('{0}' * 1000).format('a' * 1000000) }}
{{ 'a' | indent(2000000000, true) }}
{{ ('\n' * 10000) | indent('a' * 10000, blank=true) }}
LARGE {{ x | replace('a', x) }}
LARGE {{ x.replace('', x) }}
LARGE {{ x.translate({97: x}) }}
LARGE {{ x.join(x) }}
LARGE {{ x | join(x) }}
LARGE {{ range(1000) | join(d=x) }}
LARGE {{ range(1000) | map('string') | join(x) }}
LARGE {{ x | wordwrap(1, wrapstring=x) }}
LARGE {{ ('http://a.b ' * 1000) | urlize(target=x) }}
{{ [1] | batch(2000000000, 0) | list }}
{{ 5 | round(-2000000000) }}
{{ 5 | round(2000000000, 'floor') }}
{{ [[1] * 30000000, [1] * 30000000] | sum(start=[]) | length }}
{{ [1, [2]] | tojson(indent=2000000000) }}
LARGE {{ range(1000) | list | tojson(separators=(x, x)) }}
LAUGHS {{ ns.x }}
LAUGHS {{ ns.x | string }}
LAUGHS {{ ns.x | tojson }}
LAUGHS {{ '' ~ ns.x }}
LAUGHS {{ '%s' % (ns.x,) }}
LAUGHS {{ '{}'.format(ns.x) }}
LAUGHS {{ ns }}
LAUGHS {% set ns.y = [ns] %}{{ ns.y }}
LAUGHS {{ ns.x | upper }}
LAUGHS {{ ns.x == 1 }}
LAUGHS {{ 1 in [ns.x] }}
LAUGHS {{ {'a': ns.x}.values() }}
LAUGHS {{ ns.x | join }}
LAUGHS {{ ns.x | replace('a', 'b') }}
{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{{ x }}{{ x }}{% else %}a{% endif %}{% endmacro %}{{ f(40) }}
{{ strftime_now('%c' * 1000000) }}
"""
SMALL = r"""
{{ '-' * 3 }}
{{ 3 * 4 }}
{{ 2 ** 10 }}
{{ 2 * 1.5 }}
{{ 2 ** -1 }}
{{ 10000000000 * 1.5 }}
{{ 7 % 4 }}
{{ 1 < 2 < 3 }}{{ 'a' in ['a', 1] }}{{ 'b' not in {'b': 1} }}{{ [1, [2]] == [1, [2]] }}
{{ none != x }}{{ 'a' * 2 == 'aa' }}
{{ 'call 49151123456 %s, %5.1f|%-4d|%%|%c' % ('x', 2, 3, 'y') }}
{{ '%(a)s%(b)03d' % {'a': [1, 'x'], 'b': 2} }}
{{ '%s-%s' | format(1, 'x') }}
{{ '%(form)s' | format(form=1) }}
{{ '{form}{0:>4}{1[a]}'.format(1, {'a': 2}, form=3) }}
{{ '{a}'.format_map({'a': 1}) }}
{{ 'a\tb'.expandtabs() }}
{{ 'a'.center(5, '.') }}
{{ 'a' | center(5) }}
{{ 'a b' | replace('a', '<c>') }}
{{ 'aaa'.replace('a', 'b', 1) }}
{{ 'aaa' | replace('a', 'b', 2) }}
{{ 'a\nb' | indent }}
{{ 'a\nb' | indent('> ', first=true) }}
{{ 'aaa bbb' | wordwrap(3, wrapstring='|') }}
{{ [1, 'b'] | join(', ') }}
{{ [{'a': 1}, {'a': 2}] | join('-', attribute='a') }}
{{ [1, 2] | map('string') | join }}
{{ ', '.join(['a', 'b'] | map('upper')) }}
{{ ', '.join('abc') }}
{{ [3, 4] | sum }}
{{ [[1], [2]] | sum(start=[]) }}
{{ [{'a': 1}, {'a': 2.5}] | sum(attribute='a') }}
{{ [1, 2, 3] | batch(2, 'x') | list }}
{{ 5.256 | round(1) }}
{{ 42.55 | round(1, 'floor') }}
{{ 'a' ~ 1 ~ none ~ [1, 'b'] }}
{{ ('<' | escape) ~ '<' }}
{{ 'ab'.translate({97: 'x'}) }}
{{ [1, {'a': none}] }}
{{ undefined_name }}
{{ {'a': 1}.items() }}
{{ range(3) }}
{{ 'http://a.b c' | urlize }}
{% set x %}a{{ 1 }}{% endset %}{{ x }}{% macro m(a) %}<{{ a }}>{{ caller() }}{% endmacro %}{% call m(1) %}b{% endcall %}
{{ (2).to_bytes(2, 'big') }}
{% autoescape true %}{% set x, y = '<', '<' | safe %}{{ x ~ '>' }}{{ y ~ '>' }}{% endautoescape %}
{% set n = namespace(x=1) %}{% set n.x = [n] %}{{ n }}{{ n.x }}
{% filter upper %}a{{ 'b' + 'c' }}{% endfilter %}
{{ [1] + [2] }}{{ (1, 2) + (3,) }}{{ 1 + 2.5 }}{{ 'a' | string }}
"""


def render(source: str, **message: Any) -> str:
    source = source.replace("LAUGHS ", LAUGHS).replace("LARGE ", LARGE)
    return ChatTemplate({"default": source}, {}).render([{"role": "user", "content": "a", **message}])


@pytest.mark.parametrize("source", REFUSED.split("\n")[1:-1] + DOUBLINGS)
def test_what_would_make_gigabytes_is_refused_before_it_begins(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TextError, match="too large"):
        render(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_nothing_is_computed_while_a_template_is_compiled() -> None:
    tracemalloc.start()
    try:
        ChatTemplate({"default": "{{ 'a' | center(1000000) }}{{ 'b' | center(1000000) | upper }}"}, {})
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", SMALL.split("\n")[1:-1])
def test_whatever_is_small_is_as_in_a_plain_environment(source: str) -> None:
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert render(source) == plain.from_string(source).render()


def test_the_length_of_a_text_is_known_about_and_never_too_low() -> None:
    for value in [
        "a",
        b"ab",
        ["a", 1, 2.5, None],
        {"a": ["b", ("c",)]},
        2**1000,
        [[[]]],
        {},
        {"a": 1}.items(),
        range(9),
    ]:
        assert len(str(value)) <= chars([value]) + 40
    assert chars("a" * 10) == 10
    shared: Any = "ha"
    for _ in range(10):
        shared = [shared] * 1000
    assert chars(shared) > MAX_CHARS
