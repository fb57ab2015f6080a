"""Small random models of a kind, and the layouts that they are probed with."""

from transformers import CONFIG_MAPPING

from utils.data.collate import build_collator
from utils.model.small import small_model

LAYOUTS = {"padded": build_collator(0, False), "end_to_end": build_collator(0, True)}
# what a default configuration does not have
SWITCHES = {"lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}}


def small(kind):
    return small_model(CONFIG_MAPPING[kind](**SWITCHES.get(kind, {})))
