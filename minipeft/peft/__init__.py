"""Parameter-efficient fine-tuning: one file a method, each a configuration and what it trains."""
