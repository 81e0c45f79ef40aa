"""Text: the tokenizer, prompt templates, data sets, examples to train on, and the corpora that ship with it."""
