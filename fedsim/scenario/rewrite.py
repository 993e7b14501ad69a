"""Changes a few values in a scenario's text and leaves every other character as it is.

PyYAML's marks say where each node stands; the text around it is never written anew, so comments,
order, quotes and line breaks stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import yaml

from fedsim.scenario.loader import parse

Value = str | int | None

_Edit = tuple[int, int, str]
"""Characters from … to, and what replaces them."""


def put(
    text: str, path: tuple[str, ...], values: Mapping[str, Value], comment: str, mark: str
) -> str:
    """Returns the text with `values` in the mapping at `path`, made in its parent if missing.

    values: plain words, whole numbers or None (null); they replace those that the mapping has.
    comment: a line without "#" above the mapping's key; it replaces a comment there that begins
    with `mark`. Raises ValueError where the text cannot be changed this way.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise ValueError("JSON holds no comments")
    parent = _mapping_at(root, path[:-1])
    found = _item(parent, path[-1])
    if found is not None:
        edits = [
            *_changes(text, found[1], values),
            _comment(text, found[0].start_mark.index, comment, mark),
        ]
    elif parent.flow_style:
        added = _added(text, parent, [f"{path[-1]}: {{{_items(values)}}}"])
        edits = [added, _comment(text, added[0], comment, mark)]
    else:
        edits = [_added(text, parent, [f"# {comment}", f"{path[-1]}: {{{_items(values)}}}"])]
    changed = text
    edits.sort(key=lambda edit: edit[0])  # stable: what is added at one place keeps its order
    if any(a[1] > b[0] for a, b in pairwise(edits)):
        raise ValueError("edits overlap")
    for start, end, new in reversed(edits):
        changed = changed[:start] + new + changed[end:]
    if parse(changed).data != _expected(parse(text).data, path, values):
        raise ValueError("the text cannot be changed in place")
    return changed


def _expected(data: dict[str, Any], path: tuple[str, ...], values: Mapping[str, Value]) -> Any:
    data = copy.deepcopy(data)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = {**(target.get(path[-1]) or {}), **values}
    return data


def _mapping_at(node: yaml.Node, path: tuple[str, ...]) -> yaml.MappingNode:
    for key in path:
        found = _item(node, key)
        if found is None:
            raise ValueError(f"there is no {key}")
        node = found[1]
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{'.'.join(path)} is no mapping")
    return node


def _item(node: yaml.Node, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((item for item in node.value if item[0].value == key), None)


def _changes(text: str, node: yaml.Node, values: Mapping[str, Value]) -> list[_Edit]:
    """Returns the edits of an existing mapping, or of an empty value in its place."""
    if not isinstance(node, yaml.MappingNode):
        return [_replaced(node, f"{{{_items(values)}}}")]
    edits = []
    added = []
    for name, value in values.items():
        found = _item(node, name)
        if found is None:
            added.append(f"{name}: {_shown(value)}")
        else:
            edits.append(_replaced(found[1], _shown(value)))
    if added:
        edits.append(_added(text, node, added))
    return edits


def _replaced(node: yaml.Node, new: str) -> _Edit:
    start, end = node.start_mark.index, node.end_mark.index
    return start, end, new if end > start else f" {new}"


def _added(text: str, node: yaml.MappingNode, items: list[str]) -> _Edit:
    """Returns the edit that adds items at the end of a mapping."""
    if node.flow_style:
        joined = ", ".join(items)
        if not node.value:
            start = node.start_mark.index + 1
            return start, start, joined
        end = _end(node.value[-1][1])
        return end, end, f", {joined}"
    indent = " " * node.value[0][0].start_mark.column
    newline = _newline(text)
    lines = "".join(f"{indent}{item}{newline}" for item in items)
    end = _end(node)
    if end and text[end - 1] == "\n":  # a block scalar ends where the next line begins
        return end, end, lines
    following = text.find("\n", end) + 1
    if not following:
        return len(text), len(text), newline + lines
    return following, following, lines


def _end(node: yaml.Node) -> int:
    """Returns where a node's text ends; a block collection's mark is behind comments after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)


def _comment(text: str, at: int, comment: str, mark: str) -> _Edit:
    """Returns the edit that puts a comment above the line of `at`, or replaces the one there."""
    newline = _newline(text)
    start = text.rfind("\n", 0, at) + 1
    line = text[start:at]
    indent = line[: len(line) - len(line.lstrip())]
    before = text.rfind("\n", 0, max(start - 1, 0)) + 1
    above = text[before:start]
    written = f"{indent}# {comment}{newline}"
    if above.strip().startswith(f"# {mark}"):
        return before, start, written
    return start, start, written


def _items(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name}: {_shown(value)}" for name, value in values.items())


def _shown(value: Value) -> str:
    return "null" if value is None else str(value)


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"
