"""What a run keeps on disk: the output directory, the journal, the results and the report."""
