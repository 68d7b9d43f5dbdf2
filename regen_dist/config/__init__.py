"""The config of a run: a typed schema, YAML files composed by inheritance, dotted overrides. Imports no torch."""

from regen_dist.config.loading import config_hash, load_config, load_saved_config, save_config, to_yaml
from regen_dist.config.schema import RunConfig

__all__ = ["RunConfig", "config_hash", "load_config", "load_saved_config", "save_config", "to_yaml"]
