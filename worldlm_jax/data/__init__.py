"""From a source of text to batches: sources -> documents -> tokenizer -> windows -> batches."""
