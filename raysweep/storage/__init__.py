"""Files and tables on disk: atomic writes, content hashes, schemas, the cache, reading of foreign text and pickles."""
