"""The house drawn: its rooms by floors, and the imports between them, for docs/architecture.md.

The layout is Sugiyama's (Sugiyama, Tagawa and Toda 1981): long arrows get a place on each floor that they cross, the
floors are sorted so that few arrows cross, then everything moves towards what it is tied to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from textwrap import wrap

Edge = tuple[str, str]

WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT, GAP, TOP = 1040, 92, 212, 58, 20, 56
LANE_WIDTH = 6  # of an arrow that passes a floor
TINTS = ("#cfe6f7", "#d9efe3", "#f6ecd2", "#e8edf3")


@dataclass(frozen=True)
class Room:
    """A room: a module or a folder of them, the floor it lies on, and the first line of its docstring."""

    name: str
    floor: int
    purpose: str


def reduce_edges(edges: set[Edge]) -> set[Edge]:
    """Return the edges without those that a longer way replaces."""
    below: dict[str, set[str]] = {}
    for upper, lower in edges:
        below.setdefault(upper, set()).add(lower)

    def reached(name: str) -> set[str]:
        return set().union(*({lower} | reached(lower) for lower in below.get(name, set())))

    return {(a, b) for a, b in edges if not any(b in reached(other) for other in below[a] - {b})}


def tabulate(rooms: list[Room], edges: set[Edge]) -> str:
    """Return the table of the rooms, the highest floor first."""
    lines = ["| floor | room | what it is for | imports |", "| ---: | --- | --- | --- |"]
    for room in sorted(rooms, key=lambda room: (-room.floor, room.name)):
        lower = ", ".join(sorted(b for a, b in edges if a == room.name))
        lines.append(f"| {room.floor} | `{room.name}` | {room.purpose} | {lower} |")
    return "\n".join(lines)


@dataclass
class _Node:
    """A room on its row, or the place where a long arrow crosses a row."""

    row: int
    width: float
    room: Room | None = None
    x: float = WIDTH / 2
    ties: list[_Node] = field(default_factory=list)


def draw(rooms: list[Room], edges: set[Edge]) -> str:
    """Return the picture as SVG."""
    rows, ways = _place(rooms, reduce_edges(edges))
    height = TOP + len(rows) * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif" role="img" '
        'aria-label="The rooms of the package on their floors; arrows lead to what a room imports, all of them downwards.">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L10 5 L0 10 z" fill="#8a94a3"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#ffffff"/>',
        '<text x="28" y="34" font-size="13" fill="#5b6472">Arrows lead to what a room imports. '
        "One is left out where a longer way leads there too.</text>",
    ]
    for way in ways:
        parts.append(
            f'<path d="{_path_of(way)}" fill="none" stroke="#8a94a3" stroke-width="1.3" marker-end="url(#tip)"/>'
        )
    for number, row in enumerate(rows):
        tint = TINTS[number * len(TINTS) // len(rows)]
        parts += [_draw_box(node.room, node.x, _top(number), tint) for node in row if node.room]
    return "\n".join([*parts, "</svg>", ""])


def _top(row: int) -> float:
    return TOP + row * ROW


def _draw_box(room: Room, x: float, y: float, tint: str) -> str:
    lines = wrap(room.purpose.rstrip(".").replace("`", ""), 36)
    text = lines if len(lines) <= 2 else [lines[0], lines[1].rstrip(",:;") + " …"]
    left = x - BOX_WIDTH / 2
    said = "".join(
        f'<text x="{left + 10:.0f}" y="{y + 34 + 14 * number:.0f}" font-size="9.5" fill="#3d4654">{escape(line)}</text>'
        for number, line in enumerate(text)
    )
    return (
        f'<rect x="{left:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{tint}" '
        f'stroke="#5b6472" stroke-width="1.1"/><text x="{left + 10:.0f}" y="{y + 18:.0f}" font-size="13" '
        f'font-weight="bold" fill="#1c2430">{escape(room.name)}</text>{said}'
    )


def _path_of(way: list[_Node]) -> str:
    """Return a line from the first node's lower edge through the floors it crosses to the last one's upper edge."""
    y = _top(way[0].row) + BOX_HEIGHT
    path = f"M{way[0].x:.0f} {y:.0f}"
    for upper, lower in itertools.pairwise(way):
        start, end = _top(upper.row) + BOX_HEIGHT, _top(lower.row)
        middle = (start + end) / 2
        path += f" C{upper.x:.0f} {middle:.0f} {lower.x:.0f} {middle:.0f} {lower.x:.0f} {end:.0f}"
        if lower.room is None:
            path += f" V{end + BOX_HEIGHT:.0f}"
    return path


def _place(rooms: list[Room], edges: set[Edge]) -> tuple[list[list[_Node]], list[list[_Node]]]:
    """Return the rows from the highest floor down, placed, and each arrow's way through them."""
    floors = sorted({room.floor for room in rooms}, reverse=True)
    nodes = {room.name: _Node(floors.index(room.floor), BOX_WIDTH, room) for room in rooms}
    rows: list[list[_Node]] = [[] for _ in floors]
    for room in sorted(rooms, key=lambda room: room.name):
        rows[nodes[room.name].row].append(nodes[room.name])
    ways = []
    for upper, lower in sorted(edges):
        crossed = [_Node(row, LANE_WIDTH) for row in range(nodes[upper].row + 1, nodes[lower].row)]
        way = [nodes[upper], *crossed, nodes[lower]]
        for node in crossed:
            rows[node.row].append(node)
        for one, other in itertools.pairwise(way):
            one.ties.append(other)
            other.ties.append(one)
        ways.append(way)
    for row in rows:
        _spread(row)
    for number in range(60):
        for row in _sweep(rows, number):
            for node in row:
                tied = [tie.x for tie in node.ties] or [node.x]
                node.x = 0.9 * sum(tied) / len(tied) + 0.1 * WIDTH / 2
            if number < 40:  # after that the order stays, and only the places settle
                row.sort(key=lambda node: node.x)
            _spread(row)
    return rows, ways


def _sweep(rows: list[list[_Node]], number: int) -> Iterator[list[_Node]]:
    yield from rows if number % 2 else reversed(rows)


def _spread(row: list[_Node]) -> None:
    """Move the nodes of a row apart, in their order and around their middle."""
    before = sum(node.x for node in row)
    for left, right in itertools.pairwise(row):
        right.x = max(right.x, left.x + (left.width + right.width) / 2 + GAP)
    shift = (before - sum(node.x for node in row)) / len(row)
    for node in row:
        node.x += shift
    limit = WIDTH - GAP
    for node in reversed(row):
        node.x = min(node.x, limit - node.width / 2)
        limit = node.x - node.width / 2 - GAP
    limit = GAP
    for node in row:
        node.x = max(node.x, limit + node.width / 2)
        limit = node.x + node.width / 2 + GAP
