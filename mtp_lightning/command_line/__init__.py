"""Everything between the command line and the import of torch."""
