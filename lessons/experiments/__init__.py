"""The experiments behind lessons 14 to 17: what is run, and what the rows say. Lesson code, beside its results."""
