"""One file per rival; each lists its methods in METHODS and imports its library only when one is built."""
