"""The page's Markdown, rendered by the page itself."""

import json
from typing import Any

import pytest
from chrome import Page
from stand import Stand

pytestmark = pytest.mark.browser

# Source and the HTML it becomes, without the copy buttons.
CASES = {
    "paragraphs": ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    "headings": ("# A\n### B ##\n#no", "<h2>A</h2><h4>B</h4><p>#no</p>"),
    "emphasis": (
        "**b** *i* __b__ _i_ ~~s~~ ***bi*** **a *b* c**",
        "<p><strong>b</strong> <em>i</em> <strong>b</strong> <em>i</em> <del>s</del> "
        "<em><strong>bi</strong></em> <strong>a <em>b</em> c</strong></p>",
    ),
    "no emphasis": ("2 * 3 * 4, snake_case_name, **open, \\*no\\*", "<p>2 * 3 * 4, snake_case_name, **open, *no*</p>"),
    "code": ("`a` ``b ` c`` `<i>`", "<p><code>a</code> <code>b ` c</code> <code>&lt;i&gt;</code></p>"),
    "links": (
        "[a](https://a.example) <https://b.example> see https://c.example/x. (http://d.example)",
        '<p><a href="https://a.example/">a</a> <a href="https://b.example/">https://b.example</a> see '
        '<a href="https://c.example/x">https://c.example/x</a>. (<a href="http://d.example/">http://d.example</a>)</p>',
    ),
    "no links": ("[a](javascript:x) [b](/c) [d]", "<p>[a](javascript:x) [b](/c) [d]</p>"),
    "images": ("![a](https://a.example/b.png)", '<p><a href="https://a.example/b.png">a</a></p>'),
    "bullets": ("- a\n- b\n  - c\n    more\n- d", "<ul><li>a</li><li>b<ul><li>c<br>more</li></ul></li><li>d</li></ul>"),
    "numbers": ("3. a\n4. b\n\n   c\n\nd", '<ol start="3"><li><p>a</p></li><li><p>b</p><p>c</p></li></ol><p>d</p>'),
    "list and rule": ("* a\n\n***\n- b", "<ul><li>a</li></ul><hr><ul><li>b</li></ul>"),
    "quote": ("> a\n> - b\nc", "<blockquote><p>a</p><ul><li>b<br>c</li></ul></blockquote>"),
    "fence": (
        "a\n```py\nx < y\n\n  z\n```\nb",
        "<p>a</p><figure><pre><code>x &lt; y\n\n  z</code></pre></figure><p>b</p>",
    ),
    "open fence": ("~~~\n```\nx", "<figure><pre><code>```\nx</code></pre></figure>"),
    "fence in list": ("- a\n  ```\n  x\n  ```", "<ul><li>a<figure><pre><code>x</code></pre></figure></li></ul>"),
    "table": (
        "|a|b|\n|:-:|--:|\n|1|`x\\|y`|\n|2|\nend",
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><code>x|y</code></td></tr>"
        "<tr><td>2</td><td></td></tr><tr><td>end</td><td></td></tr></tbody></table></div>",
    ),
    "no table": ("a | b\nc", "<p>a | b<br>c</p>"),
}

RENDER = """
import('/static/markdown.js').then(({ Markdown }) => {
  const source = %s, size = %d, box = document.createElement('div'), markdown = new Markdown(box);
  for (let at = 0; at < source.length; at += size) markdown.push(source.slice(at, at + size));
  box.querySelectorAll('figcaption').forEach(element => element.remove());
  for (const element of box.querySelectorAll('*'))
    for (const name of element.getAttributeNames())
      if (!['href', 'start'].includes(name)) element.removeAttribute(name);
  return box.innerHTML;
})"""


async def rendered(page: Page, source: str, size: int) -> str:
    """What Markdown becomes that is pushed in pieces of `size` characters."""
    found: str = await page.value(RENDER % (json.dumps(source), size))
    return found


def test_markdown_becomes_elements_whatever_pieces_it_comes_in(chatting: Any, rich: str) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        for name, (source, expected) in CASES.items():
            for size in (10_000, 1, 3):
                assert await rendered(page, source, size) == expected, (name, size)
        whole = await rendered(page, rich * 3, 10_000)
        for size in (1, 2, 7):
            assert await rendered(page, rich * 3, size) == whole

    chatting(scenario)


def test_settled_blocks_are_not_built_again(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        kept = await page.value(
            """import('/static/markdown.js').then(({ Markdown }) => {
              const box = document.createElement('div'), markdown = new Markdown(box);
              markdown.push('one\\n\\n```\\ncode');
              const [first, code] = box.children;
              markdown.push(' goes on');
              const same = box.children[1] === code;
              markdown.push('\\n```\\nlast\\nlines');
              return [same, box.children[0] === first, box.children[1] === code, markdown.open];
            })"""
        )
        assert kept == [True, True, True, "last\nlines"]

    chatting(scenario)


@pytest.mark.parametrize(
    "piece", ["*", "[", "`", "_a", "> ", "- ", "|a|\n|-|\n", "**a", "[a](", "~~", "1. ", "\\", "***a**", "``` "]
)
def test_awkward_text_is_rendered_in_little_time(chatting: Any, piece: str) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        began = await page.value("performance.now()")
        await rendered(page, piece * (6000 // len(piece)), 200)
        assert await page.value("performance.now()") - began < 3000

    chatting(scenario)


def test_code_is_copied_as_it_is(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        served.workers.say("```py\nif a < b:\n    c()\n```")
        await page.value(
            "navigator.clipboard.writeText = text => { globalThis.copied = text; return Promise.resolve(); }"
        )
        await page.type("hi")
        await page.press("Enter")
        await page.click("figcaption button")
        await page.until("globalThis.copied")
        assert await page.value("copied") == "if a < b:\n    c()"
        assert await page.text("figcaption") == "py\nCopied"

    chatting(scenario)
