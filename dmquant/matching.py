"""Find the rules that match a layer's name: exact names are looked up, globs are compiled once."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

_WILD = re.compile(r"[*?\[]")


class Matcher:
    """The patterns of several rules, each a name or a glob, or a list of these. Case counts."""

    def __init__(self, patterns: Sequence[str | list[str]]):
        self._named: dict[str, set[int]] = {}
        self._globs: list[tuple[int, re.Pattern[str]]] = []
        for rule, listed in enumerate(patterns):
            globs = [pattern for pattern in as_list(listed) if _WILD.search(pattern)]
            for name in set(as_list(listed)).difference(globs):
                self._named.setdefault(name, set()).add(rule)
            if globs:
                self._globs.append((rule, re.compile("|".join(map(fnmatch.translate, globs)))))

    def matching(self, name: str) -> list[int]:
        """Indices of the rules that match, ascending."""
        by_glob = (rule for rule, glob in self._globs if glob.match(name))
        return sorted({*self._named.get(name, ()), *by_glob})


def without_match(patterns: Sequence[str | list[str]], names: Iterable[str]) -> list[str]:
    """The patterns that match none of the names, in their order."""
    listed = [pattern for one in patterns for pattern in as_list(one)]
    matcher, found = Matcher(listed), set()
    for name in names:
        found.update(matcher.matching(name))
    return [pattern for index, pattern in enumerate(listed) if index not in found]


def as_list(listed: str | list[str]) -> list[str]:
    """A rule's `match` as a list."""
    return [listed] if isinstance(listed, str) else listed
