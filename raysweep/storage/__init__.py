"""Files, folders and tables: atomic writes, content hashes, the cache, reading of foreign text and pickles."""
