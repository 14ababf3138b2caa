"""Files and tables on disk: atomic writes, claims on folders, content hashes, schemas, the cache, reading of foreign text and pickles."""
