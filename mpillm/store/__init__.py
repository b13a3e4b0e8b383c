"""The files of a run: the output directory, the journal, the results and the report."""
