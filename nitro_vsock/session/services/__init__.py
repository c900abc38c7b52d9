"""One file for each service of a session. Knows nothing of a session's phases."""
