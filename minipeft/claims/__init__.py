"""The textbook on trial: every claim of fine-tuning with its evidence."""
