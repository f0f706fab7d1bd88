"""Any configuration, for hypothesis."""

from hypothesis import strategies as st

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True).filter(lambda key: key != "target")
TREES = st.dictionaries(
    KEYS,
    st.recursive(SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(KEYS, of, max_size=3), max_leaves=12),
)
