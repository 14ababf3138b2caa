"""The settings of a sweep: schema, reading of files and overrides, presets."""
