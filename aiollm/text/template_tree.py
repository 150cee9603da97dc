"""What the text of a chat template tells of the content that it wants."""

from typing import Any

from jinja2.nodes import Compare, Const, Filter, For, Getattr, Getitem, Name, Operand, Template, Test


def loops_over_content(tree: Template) -> bool:
    """Whether some {% for %} runs over content, filtered or not: parts of it are wanted, not their text."""
    return any(_is_content(_unfiltered(loop.iter)) for loop in tree.find_all(For))


def compares_content_with_none(tree: Template) -> bool:
    """Whether content is asked for none somewhere: that is how a message of calls alone is told from an answer."""
    tests = any(test.name == "none" and _is_content(test.node) for test in tree.find_all(Test))
    return tests or any(map(_equals_none, tree.find_all(Compare)))


def _unfiltered(node: Any) -> Any:
    while isinstance(node, Filter):
        node = node.node
    return node


def _equals_none(node: Compare) -> bool:
    match node.ops:
        case [Operand(op="eq" | "ne", expr=Const(value=None))]:
            return _is_content(node.expr)
    return False


def _is_content(node: Any) -> bool:
    """Whether an expression is `content`, `x.content` or `x['content']`."""
    match node:
        case Name(name="content") | Getattr(attr="content") | Getitem(arg=Const(value="content")):
            return True
    return False
