"""Text in and out: the tokenizer, control tokens, chat templates, messages, and what ends an answer."""
