"""Rules match as fnmatch does, whatever their number."""

import fnmatch

from hypothesis import given
from hypothesis import strategies as st

from dmquant.matching import Matcher, as_list, without_match

PATTERNS = st.text("ab.*?[!]-0", max_size=6)
NAMES = st.text("ab.*?[!]-0A\n", max_size=6)
RULES = st.lists(PATTERNS | st.lists(PATTERNS, max_size=4), max_size=5)


@given(RULES, NAMES)
def test_as_by_fnmatch(rules, name):
    expected = [
        index for index, rule in enumerate(rules) if any(fnmatch.fnmatchcase(name, glob) for glob in as_list(rule))
    ]
    assert Matcher(rules).matching(name) == expected


@given(RULES, st.lists(NAMES, max_size=4))
def test_patterns_without_a_match_are_those_that_filter_nothing(rules, names):
    listed = [glob for rule in rules for glob in as_list(rule)]
    missed = [glob for glob in listed if not any(fnmatch.fnmatchcase(name, glob) for name in names)]
    assert without_match(rules, names) == missed
