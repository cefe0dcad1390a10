"""Public names that are imported when they are first used."""

import pytest

from fmn.lazy import lazy


def test_a_name_comes_from_its_module_and_others_do_not_exist() -> None:
    get = lazy("fmn.store", {"digest_bytes": "artifacts"})
    assert get("digest_bytes")(b"").startswith("e3b0c442")
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        get("other")
