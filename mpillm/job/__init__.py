"""A job: what is asked (spec, requests), what is kept (journal), what comes out (answers, results, report)."""
