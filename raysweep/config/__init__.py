"""Settings of a sweep: their schema, how files and overrides are read, presets."""
