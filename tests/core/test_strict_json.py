import pytest

from ld_common.core.errors import ConfigError
from ld_common.core.strict_json import read_json
from ld_common.protocol.study_config import study_from_json


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', b'{"a": 1, "\\u0061": 2}'])
@pytest.mark.attack
def test_a_key_that_stands_twice_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="twice"):
        read_json(text)
    assert read_json('{"a": {"a": 1}}') == {"a": {"a": 1}}


@pytest.mark.attack
def test_a_task_s_study_has_each_key_once() -> None:
    """A site that reads the last of two keys must not be compared with a reader of the first."""
    with pytest.raises(ConfigError):
        study_from_json('{"seed": 1, "seed": 2}')
    assert study_from_json('{"seed": 2}').seed == 2
