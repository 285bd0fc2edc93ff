"""Where a text that is longer than a row of tokens is cut, and which sentences share a row."""

from __future__ import annotations

from collections.abc import Iterator


def windows(sizes: list[int], room: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows over words of these sizes, each at most `room`: `(start, end, read_start, read_end)` in words.

    The parts that are read follow one another without gap or overlap. No words are one empty window.
    """
    start = end = read_start = 0
    while True:
        used = sum(sizes[start:end])
        while end < len(sizes) and used + sizes[end] <= room:
            used += sizes[end]
            end += 1
        if end == len(sizes):
            yield start, end, read_start, end
            return
        shared = min(room // 4, room - sizes[end])  # the next word has to fit behind what is shared
        following = end
        while following > start and shared >= sizes[following - 1]:
            following -= 1
            shared -= sizes[following]
        read_end = (following + end + 1) // 2
        yield start, end, read_start, read_end
        start, read_start = following, read_end


def parts(ids: list[int], size: int) -> Iterator[list[int]]:
    """`ids` in parts of `size`, the last of which may be shorter."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def neighbours(sentences: list[list[int]], room: int) -> list[list[list[int]]]:
    """Groups of two neighbours or more, at most `room` tokens each, of sentences of at most half of it."""
    groups: list[list[list[int]]] = []
    used = room
    for sentence in sentences:
        if used + len(sentence) > room:
            groups.append([])
            used = 0
        groups[-1].append(sentence)
        used += len(sentence)
    if len(groups) > 1 and len(groups[-1]) == 1 and len(groups[-2]) > 2:
        groups[-1].insert(0, groups[-2].pop())
    return [group for group in groups if len(group) > 1]
