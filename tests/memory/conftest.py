"""A model's configuration, without weights."""

import pytest
import tiny


@pytest.fixture
def config_folder(tmp_path):
    """A folder with a config.json alone."""

    def make(architecture="qwen2", vocabulary=512, **changes):
        tiny.config_for(architecture, vocabulary, **changes).save_pretrained(tmp_path / architecture)
        return tmp_path / architecture

    return make
